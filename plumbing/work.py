"""Work that is dealt to the ranks, and kept in files beside its result, so that it goes on after a stop."""

import json
import re

import torch.distributed as dist
from tqdm import tqdm  # comes with transformers

from plumbing.kept import appended, kept_lines
from plumbing.ranks import all_sum


class Kept:
    """Rows {"key": ..., ...} that all ranks append to files of their own beside --out, and read together. The
    files' names have a digest of what made the rows, so that none of other settings is ever taken."""

    def __init__(self, out, digest, kind):
        self.folder, self.name = out.parent, f"{out.name}.{digest}.{kind}.rank"
        self.path = self.folder / f"{self.name}{dist.get_rank()}.jsonl"
        self.rows, self.size = {}, 0
        self.read()

    def files(self):
        return sorted(path for path in self.folder.iterdir() if path.name.startswith(self.name))

    def read(self):
        """Every rank gets what all of them have written."""
        dist.barrier()
        for path in self.files():
            rows, size = kept_lines(path, "key")
            self.rows.update((row["key"], row) for row in rows)
            self.size = size if path == self.path else self.size
        dist.barrier()  # nobody writes before all have read

    def work(self, todo, batch, do, title, device):
        """do(part) -> rows, for the parts of todo, dealt to the ranks `batch` at a time; the rows are kept.
        The ranks stay together, so that none of them waits for longer than a batch takes. What the others
        have written is in `rows` after the next read()."""
        rank, world = dist.get_rank(), dist.get_world_size()
        with appended(self.path, self.size) as f, tqdm(total=len(todo), desc=title,
                                                       disable=None if rank == 0 else True) as bar:
            for i in range(0, len(todo), batch * world):
                part = todo[i:i + batch * world][rank::world]
                for row in do(part) if part else ():
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                bar.update(int(all_sum(len(part), device=device)[0]))
        self.size = None  # the file ends with a whole line from here on


def remove_kept(out):
    """Called by every rank when the file is whole."""
    for path in list(out.parent.iterdir()) if dist.get_rank() == 0 else ():
        if re.fullmatch(re.escape(out.name) + r"\.\w+\.(answers|scores)\.rank\d+\.jsonl", path.name):
            path.unlink()
