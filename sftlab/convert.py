"""sftlab convert FILE: a config of NeMo AutoModel or axolotl as an experiment, and a list of what is left."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from sftlab.config import start


def convert(cfg: DictConfig) -> None:
    """Write the experiment, and show what became of the file."""
    from sftlab.common.files import write_whole
    from sftlab.common.words import plain
    from sftlab.config import conversion
    from sftlab.config.composing import composed

    file = Path(str(cfg.file)).expanduser()
    if not file.is_file():
        raise ValueError(f"file={file}: there is no such file")
    made = conversion.convert(file)
    output = Path(str(cfg.output)).expanduser() if cfg.output else Path("conf", "experiment", f"{file.stem}.yaml")
    if output.exists() and not cfg.overwrite:
        raise ValueError(f"output={output} exists: name another file, or set overwrite=true")
    if output.parent.name != "experiment" or output.suffix != ".yaml":
        raise ValueError(f"output={output}: expected a file FOLDER/experiment/NAME.yaml, which experiment=NAME finds")
    output.parent.mkdir(parents=True, exist_ok=True)
    text = conversion.as_experiment(made, file)
    write_whole(output, text)
    folder = output.parent.parent
    try:
        composed([f"experiment={output.stem}", *made.command], folder)
        wrong = ""
    except ValueError as error:
        wrong = str(error)
    print(f"{made.tool} -> {output}")
    shown = [word for word in (*(f"{k}={v}" for k, v in made.settings.items()), *made.command)]
    for title, lines in (("set", shown), ("note", made.notes), ("without a counterpart", made.left)):
        if lines:
            print(f"{title}:\n" + "\n".join(f"  {plain(line)}" for line in lines))
    if wrong:
        print(f"to mend before it runs:\n  {plain(wrong)}")
    command = ["--config-dir", str(folder), f"experiment={output.stem}", *made.command]
    words = shlex.join(command)
    print(f"look at its data with\n  sftlab preview {words}\nrun it with\n  sftlab train {words}")


def main() -> None:
    """Entry point. The file may be named without `file=`."""
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"file={sys.argv[1]}"
    start.main(convert, "convert")


if __name__ == "__main__":
    main()
