"""What importing the scripts does."""

import subprocess
import sys

from conftest import ROOT


def test_importing_a_stage_touches_nothing(tmp_path):
    """No network, no files, no process group: importing is free of side effects."""
    code = ("import socket;"
            " socket.socket.connect = lambda *a: (_ for _ in ()).throw(RuntimeError('network'));"
            f"import sys; sys.path.insert(0, {str(ROOT)!r});"
            " import sft, train_rm, train_gvm, train_dvpo, train_ppo, train_remax, train_grpo, train_dpo;"
            " import label, continuations, evaluate, judge, report;"
            " import torch;"
            "assert not torch.distributed.is_initialized()")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
