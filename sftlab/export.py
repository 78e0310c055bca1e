"""python -m sftlab.export run=DIR step=N: write a checkpoint of a run as a Hugging Face folder, on the host alone."""

from pathlib import Path

from omegaconf import DictConfig

from sftlab.config import start


def export(cfg: DictConfig) -> None:
    """Export one checkpoint of `run`, the newest without `step`; prints where it lies."""
    from sftlab.checkpoints.manifest import complete_checkpoints
    from sftlab.common.files import refuse_links
    from sftlab.inference.trained_model import export_checkpoint, is_model, step_of

    run = Path(str(cfg.run)).expanduser()
    checkpoints = {step_of(p): p for p in complete_checkpoints(run / "checkpoints")}
    if not checkpoints:
        raise ValueError(f"run={cfg.run}: expected a run's directory; there is no checkpoint in {run / 'checkpoints'}")
    step = max(checkpoints) if cfg.step is None else cfg.step
    if step not in checkpoints:
        raise ValueError(f"step={step}: this run has checkpoints of steps {', '.join(map(str, sorted(checkpoints)))}")
    name = checkpoints[step].name + ("_merged" if cfg.merge else "")
    output = Path(str(cfg.output)).expanduser() if cfg.output else refuse_links(run, "export", name)
    if output.exists() and not is_model(output):
        raise ValueError(f"output={output} exists and is no model folder: it would be overwritten. Name another")
    dtype = export_checkpoint(checkpoints[step], output, cfg.dtype, cfg.shard_size, trust=cfg.trust, merge=cfg.merge)
    print(f"step {step}, {dtype}: {output}")


def main() -> None:
    """Entry point."""
    start.main(export, "export")


if __name__ == "__main__":
    main()
