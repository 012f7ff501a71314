"""Settings of a run: from files, and those that are shipped."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from vxl_kernels import _ext
from vxl_train.settings import TrainSettings

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


def test_settings_from_a_file(tmp_path):
    text = "learning_rate: 1e-5\nratio: [2, 8]\nframes: 16\nwarmup_steps: 0.1\nuse_cpu: true\n"
    (tmp_path / "c.yaml").write_text(text)
    read = TrainSettings.read(tmp_path / "c.yaml", "finetune", on_bad_sample="stop")
    assert (read.ratio, read.frames, read.on_bad_sample) == ([2, 8], 16, "stop")
    arguments = read.training_arguments(str(tmp_path))
    assert arguments.learning_rate == 1e-5
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.report_to == []
    (tmp_path / "c.json").write_text('{"frames": 3}')
    assert TrainSettings.read(tmp_path / "c.json", "align").frames == 3


def test_shipped_settings(tmp_path):
    from vxl_train.cli import CONFIGS

    for stage in ("align", "finetune"):
        read = TrainSettings.read(CONFIGS / f"{stage}.yaml", stage, use_cpu=True)
        assert read.training_arguments(str(tmp_path)).get_warmup_steps(1000) == 30
