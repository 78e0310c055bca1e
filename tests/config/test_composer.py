"""The launcher's fast composition of points gives what Hydra's own gives."""

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.sftlab_launcher._compose import Composer
from sftlab.config.groups import CONF
from sftlab.config.overrides import inside


@pytest.mark.parametrize(
    "point",
    [
        [],
        ["optim.lr=1e-5", "seed=3"],
        ["model=smollm2_135m", "data=squad", "optim.lr=3e-5", "data.limit=100"],
        ["schedule=wsd", "schedule.decay_ratio=0.5"],
        ["experiment=llama3_2_1b_squad", "trainer.batch_size=64"],
        ["schedule=constant", "~schedule.warmup_steps", "+schedule.more={a: 1, b: [x, 'y,z']}"],
        ["++trainer.epochs=null", "model.name_or_path='a=b,c'"],
        ["tracker=none", "launcher=slurm", "launcher.sbatch={hold: true}"],
    ],
)
def test_points_are_composed_as_hydra_composes_them(point, monkeypatch):
    monkeypatch.setenv("SFTLAB_START_TIME", "now")
    OmegaConf.register_new_resolver("inside", inside, replace=True)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", [], RunMode.MULTIRUN)
        compose = Composer(loader)
        compose(master, ["seed=77", *[o for o in point if o != "seed=3"]])  # a base that others share stays clean
        fast, slow = compose(master, point), loader.load_sweep_config(master, point)
        for config in (fast, slow):
            assert list(config.hydra.overrides.task) == point
        strip = [str(key) for key in slow if key != "hydra"]
        assert OmegaConf.to_container(OmegaConf.masked_copy(fast, strip)) == OmegaConf.to_container(
            OmegaConf.masked_copy(slow, strip)
        )
        assert fast.hydra.runtime.choices == slow.hydra.runtime.choices
