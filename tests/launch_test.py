"""What a user can get wrong on the command line and in gin files, and what is said about it."""

import itertools
import sys

import gin
import pytest

from modjax import launch

BASE, METHOD, RUN = (
    "--gin_file=bases/t5_small.gin",
    "--gin_file=methods/full.gin",
    "--gin_file=runs/pretrain.gin",
)
SET = (
    "--gin.MIXTURE_OR_TASK_NAME='m'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
    "--gin.TRAIN_STEPS=3",
    "--gin.MODEL_DIR='d'",
)


def load(*argv):
    launch.load_gin(launch.parse_flags(argv, "test"), "train")


@pytest.mark.parametrize(
    "method", ["flix", "lora_per_dataset", "poly_z", "adamix_lora", "ia3", "full"]
)
def test_files_overlay_in_any_order(method):
    files = (
        "--gin_file=bases/mt5_small.gin",
        f"--gin_file=methods/{method}.gin",
        "--gin_file=runs/finetune.gin",
    )
    texts = set()
    for order in itertools.permutations(files):
        load(*order, *SET, "--gin.BASE='x'")
        texts.add(gin.config_str())
    assert len(texts) == 1
    assert "vocab_size = 250112" in texts.pop()


def test_two_methods_are_not_mixed(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text("include 'methods/poly_s.gin'\nMETHOD = 'mine'\n")
    run = (BASE, "--gin_file=runs/finetune.gin", *SET, "--gin.BASE='x'")
    poly_s, poly_z, mine = (
        f"--gin_file={name}" for name in ("methods/poly_s.gin", "methods/poly_z.gin", path)
    )
    # One includes the other, and comes after it.
    for files in ((poly_s, poly_z), (poly_s, poly_s), (poly_s, mine), (mine,)):
        load(*files, *run)
    for files in ((poly_z, poly_s), (mine, poly_z), ("--gin_file=methods/lora.gin", mine)):
        first, second = (name.partition("=")[2] for name in files)
        with pytest.raises(launch.ConfigError, match=f"{first} and {second} are two methods"):
            load(*files, *run)


def test_a_file_that_a_later_one_undoes_is_named():
    flix, layers = "--gin_file=methods/flix.gin", "--gin_file=methods/every_linear_layer.gin"
    run = (BASE, "--gin_file=runs/finetune.gin", *SET, "--gin.BASE='x'")
    load(flix, layers, *run)
    with pytest.raises(launch.ConfigError) as error:
        load(layers, flix, *run)
    assert str(error.value) == (
        "methods/every_linear_layer.gin has no effect, as methods/flix.gin sets ADAPTED_LAYERS, too, and comes after "
        "it: give methods/every_linear_layer.gin last"
    )


def test_every_base_and_every_run_parses():
    for path in sorted((launch.CONFIGS / "bases").glob("*.gin")):
        load(f"--gin_file=bases/{path.name}", METHOD, RUN, *SET)
    pretraining = [path.name for path in (launch.CONFIGS / "runs").glob("*pretrain*.gin")]
    assert len(pretraining) == 3
    for name in pretraining:
        more = "--gin.INITIAL_CHECKPOINT_PATH='c'"  # what the bytes' run begins with
        load(BASE, METHOD, f"--gin_file=runs/{name}", *SET, more)
    demo = (f"--gin_file={name}" for name in ("bases/folder.gin", "methods/flix.gin", "demo.gin"))
    load(*demo, "--gin.MODEL_DIR='d'")


def test_bindings_win_over_files_and_may_name_what_no_file_names():
    load(BASE, METHOD, RUN, *SET, "--gin.optimizers.adamw.b2=0.9", "--gin.BATCH_SIZE=7")
    assert gin.query_parameter("optimizers.adamw.b2") == 0.9
    assert gin.query_parameter("BATCH_SIZE/gin.macro.value") == 7


def test_a_binding_may_take_the_place_of_a_macro_that_our_files_set_and_not_of_ones_own():
    direct = ("--gin.t5.T5Config.scan_layers=True", "--gin.t5.T5Config.dtype='bfloat16'")
    load(BASE, METHOD, RUN, *SET, *direct)
    with pytest.raises(launch.ConfigError, match="DTYPE is set but nothing uses it"):
        load(BASE, METHOD, RUN, *SET, *direct, "--gin.DTYPE='bfloat16'")


def test_users_files_are_found_on_the_search_path(tmp_path):
    (tmp_path / "mine.gin").write_text("include 'runs/pretrain.gin'\nBATCH_SIZE = 5\n")
    load(f"--gin_search_paths={tmp_path}", BASE, METHOD, "--gin_file=mine.gin", *SET)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--gin.TRAIN_STEP=5"],
            "TRAIN_STEP is set but nothing uses it. Did you mean 'TRAIN_STEPS'",
        ),
        (["--gin.BATCH_SIZE=%BATHC"], "macro BATHC is used but not set. Did you mean 'BATCH_SIZE'"),
        (
            ["--gin.models.EncoderDecoderModel.labelsmoothing=0.1"],
            "DecoderModel has no parameter 'labelsmoothing'. Did you mean 'label_smoothing'",
        ),
        (
            ["--gin.models.EncoderDecodrModel.z_loss=0.1"],
            "'models.EncoderDecodrModel' does not exist. Did you mean 'models.EncoderDecoderModel'",
        ),
        (
            ["--gin.model.EncoderDecoderModel.z_loss=1"],
            "'model' is not imported. Did you mean 'models'",
        ),
        (
            ["--gin.optimizers.Optimizer.algorithm=@optimizers.adam()"],
            "'optimizers.adam' does not exist. Did you mean 'optimizers.adamw'",
        ),
        (
            ["--gin.train.train.log_perod=5"],
            "train.train has no parameter 'log_perod'. Did you mean",
        ),
        (["--gin.BATCH_SIZE==3"], "Unable to parse value. In the binding: BATCH_SIZE = =3"),
        (
            ["--gin.BASE=weights/t5"],
            "'weights' is not a value. In the binding: BASE = weights/t5. Text needs quotes: BASE='...'",
        ),
        (
            ["--gin.BASE=/weights/t5"],
            "Unable to parse value. In the binding: BASE = /weights/t5. Text needs quotes: BASE='...'",
        ),
        (["--gin_file=bases/t5_smal.gin"], "no gin file 'bases/t5_smal.gin'"),
        (["--gin_file=bases/t5_smal.gin"], "Did you mean 'bases/t5_small.gin'"),
        (["--gni.BATCH_SIZE=3"], "unknown flag '--gni.BATCH_SIZE=3'"),
    ],
)
def test_a_misspelling_is_named_with_the_nearest_known_name(argv, message):
    with pytest.raises(launch.ConfigError) as error:
        load(BASE, METHOD, RUN, *SET, *argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            (BASE, METHOD, RUN, *SET[1:]),
            "MIXTURE_OR_TASK_NAME must be set: --gin.MIXTURE_OR_TASK_NAME=",
        ),
        (
            (METHOD, RUN, *SET),
            r"macro MODEL is used but not set (a file of gin_configs/bases sets it)",
        ),
        (
            (BASE, RUN, *SET),
            r"macro METHOD is used but not set (a file of gin_configs/methods sets it)",
        ),
    ],
)
def test_what_is_not_given_is_named(argv, message):
    with pytest.raises(launch.ConfigError) as error:
        load(*argv)
    assert message in str(error.value)


def test_mistakes_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "mine.gin"
    for text, message in (
        ("include 'bases/t5_tiny.gin'", "included gin file is missing: bases/t5_tiny.gin"),
        ("from modjax import modls", "No module named 'modjax.modls'"),
        ("from modjax import models\nmodels.EncoderDecoderModl.z_loss = 1", 'mine.gin", line 3'),
        ("BASE = weights/t5", "mine.gin, line 2: BASE = weights/t5. Text needs quotes: BASE='...'"),
    ):
        path.write_text(f"from __gin__ import dynamic_registration\n{text}\n")
        with pytest.raises(launch.ConfigError) as error:
            load(BASE, METHOD, RUN, f"--gin_file={path}", *SET)
        assert message in str(error.value)


def test_a_task_module_that_does_not_exist_is_named(tmp_path, monkeypatch):
    with pytest.raises(launch.ConfigError, match="no module 'my.tasks'"):
        launch.import_tasks("my.tasks")
    (tmp_path / "broken_tasks.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_installed"):
        launch.import_tasks(["broken_tasks"])


def test_a_task_module_may_define_what_gin_configures(tmp_path, monkeypatch):
    (tmp_path / "configured_tasks.py").write_text(
        "import gin\n@gin.configurable\ndef folder(path='here'):\n    return path\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    load(BASE, METHOD, RUN, *SET)
    launch.import_tasks("configured_tasks")
    assert sys.modules["configured_tasks"].folder() == "here"
    assert gin.config_is_locked()


def test_a_setting_on_the_command_line_that_has_no_effect_is_refused():
    def made(*argv):
        flags = launch.parse_flags([BASE, METHOD, RUN, *SET, *argv], "test")
        launch.load_gin(flags, "train")
        gin.query_parameter("train.train.model").scoped_configurable_fn()
        gin.query_parameter("train.train.optimizer").scoped_configurable_fn()
        return launch.operative_config(flags)

    used = "--gin.optimizers.adafactor.decay_rate=0.9"
    assert "adafactor.decay_rate = 0.9" in made(used, "--gin.Z_LOSS=0.1")
    with pytest.raises(launch.ConfigError, match="adamw.b2 is set but this run does not use"):
        made(used, "--gin.optimizers.adamw.b2=0.9")


@pytest.mark.parametrize("folder", ["runs", "bases", "methods"])
def test_a_users_folder_of_the_same_name_hides_no_gin_file(folder, tmp_path, monkeypatch):
    (tmp_path / folder / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    load(BASE, METHOD, RUN, *SET)


def test_changed_settings_leave_out_what_a_sitting_chooses():
    before = """# Macros:
LEARNING_RATE = 0.5
MODEL_DIR = 'a'
TRAIN_STEPS = 2
LONG = \\
    {'inputs': 8,
     'targets': 4}
optimizers.Optimizer.clip_norm = None
train.train.log_period = 1
"""
    now = before.replace("0.5", "0.1").replace("'a'", "'b'").replace("= 2", "= 3").replace("8", "9")
    now = now.replace("None", "1.0").replace("period = 1", "period = 7") + "NEW = 1\n"
    assert launch.changed_settings(before, now) == [
        "LEARNING_RATE = 0.1, was 0.5",
        "LONG = {'inputs': 9, 'targets': 4}, was {'inputs': 8, 'targets': 4}",
        "optimizers.Optimizer.clip_norm = 1.0, was None",
    ]
    assert not launch.changed_settings(before, before)


def test_seqio_is_told_where_cached_tasks_and_datasets_lie(tmp_path, monkeypatch):
    import seqio

    told = []
    monkeypatch.setattr(seqio, "add_global_cache_dirs", told.append)
    monkeypatch.setattr(seqio, "set_tfds_data_dir_override", told.append)
    flags = [f"--seqio_additional_cache_dirs=gs://bucket/a,{tmp_path}", "--tfds_data_dir=/data"]
    launch._find_data(launch.parse_flags(flags, "test"))
    assert told == [["gs://bucket/a", str(tmp_path)], "/data"]
    launch._find_data(launch.parse_flags([], "test"))
    assert len(told) == 2
    with pytest.raises(launch.ConfigError, match="there is no folder '/nowhere'"):
        launch._find_data(launch.parse_flags(["--seqio_additional_cache_dirs=/nowhere"], "test"))
