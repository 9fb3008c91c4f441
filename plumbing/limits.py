"""A foreign program, as a chat template is one, is tried where it can do no harm."""

import os
import resource
import signal

from plumbing.errors import BadInput

SECONDS, MEMORY, LETTERS = 10, 1 << 28, 1_000_000


def check_limits(render, what):
    """Call render() -> text in a child process first; BadInput where that takes more than it may of time,
    memory [bytes] or letters. What else goes wrong there is for the caller's own call of it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child, whatever it is doing
            signal.alarm(SECONDS)
            with open("/proc/self/statm") as f:
                used = int(f.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            status = int(len(render()) > LETTERS)
        except MemoryError:
            pass
        except BaseException:
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise BadInput(f"{what}: on one short question it takes more than {SECONDS} seconds, "
                       f"{MEMORY >> 20} MiB or {LETTERS:,} letters; choose another model or mend it.")
