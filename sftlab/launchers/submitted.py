"""What SLURM starts on every rank: Submitit's pickled job, once it is certain that nobody else could have written it.

A pickle runs whatever its writer wanted, so it is as good as its folder: `.submitit` has the mode 0700 and is ours.
"""

import os
import stat
import sys
from pathlib import Path

from sftlab.common.secrets import strike_output

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


class Exposed(PermissionError):
    """A pickled job that somebody else may have replaced."""


def refuse_exposed(root: Path, *inside: Path) -> None:
    """Raise Exposed if another user may write `root`, or may enter it and write what is `inside`."""
    for path in (root, *inside):
        found = path.lstat()
        mode = found.st_mode
        entered = path == root or root.lstat().st_mode & OTHERS_ENTER
        if stat.S_ISLNK(mode) or found.st_uid != os.getuid() or (entered and mode & OTHERS_WRITE):
            raise Exposed(
                f"{path} is a link, belongs to another user or may be written by others (mode {stat.filemode(mode)}): "
                f"a pickled job in it is not run. chmod -R go-rwx {root}, then submit again"
            )


def main() -> None:
    """Check the folder of this rank's job and run the job."""
    from submitit.core.job_environment import JobEnvironment
    from submitit.core.submission import process_job

    strike_output()
    folder = Path(sys.argv[1])
    os.environ["SUBMITIT_FOLDER"] = str(folder)
    pickled = Path(JobEnvironment().paths.submitted_pickle)
    root = next(parent for parent in folder.parents if "%" not in str(parent))
    refuse_exposed(root, *(path for path in (pickled.parent, pickled) if path.exists()))
    process_job(folder)


if __name__ == "__main__":
    main()
