"""A process under a supervisor: `python -m shared.child MODULE:FUNCTION ARGUMENT...`

It calls one function, usually the main of one of Flower's commands, and never outlives the
supervisor: not even one that was killed so hard that it could end nobody.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback

_PR_SET_PDEATHSIG = 1
_LOOK_S = 2.0

SUPERVISOR = "FEDWARD_SUPERVISOR"
"""In the environment of all that a supervisor starts: its process id."""


def die_with_parent() -> None:
    """End this process soon after its parent ended, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    end_after_parent()


def end_after_parent() -> None:
    """End this process within seconds once its parent or the supervisor above it has ended.

    For what a child of the supervisor starts, such as the ServerApp: were it left behind, it would
    hold the lock of its run, and `run` would wait for it.
    """
    supervisor = int(os.environ.get(SUPERVISOR, "0"))
    threading.Thread(target=_watch, args=(os.getppid(), supervisor), daemon=True).start()


def _watch(parent: int, supervisor: int) -> None:
    while os.getppid() == parent and (not supervisor or _runs(supervisor)):
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5 * _LOOK_S)
    os._exit(1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> None:
    """Call the function that the first argument names; the rest are its arguments.

    The process ends with the function, whatever threads that leaves behind: a SuperNode that has
    given its connection up would else stay for ever, and its supervisor would see nothing.
    """
    die_with_parent()
    module, _, function = sys.argv[1].partition(":")
    sys.argv = [function.replace("_", "-"), *sys.argv[2:]]
    code = 1
    try:
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
