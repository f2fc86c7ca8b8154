from pathlib import Path

from embeddings.config import AlignmentConfig, DashClipTraining, PretrainingConfig
from embeddings.sampling import SamplingConfig
from features.config_file import from_toml, to_toml


def test_a_table_in_a_table_is_read_as_it_was_written(tmp_path):
    config = DashClipTraining(
        pretraining=PretrainingConfig(momentum=0.0),
        alignment=AlignmentConfig(
            symmetric=True, sampling=SamplingConfig(negatives=7, proxies=False)
        ),
    )
    path = Path(tmp_path, "training.toml")
    path.write_text(to_toml(config), encoding="utf-8")
    assert "\n[alignment.sampling]\npositives = 110\nnegatives = 7\n" in to_toml(config)
    assert from_toml(path, DashClipTraining) == config
