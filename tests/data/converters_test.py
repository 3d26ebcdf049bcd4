"""The feature converter: SeqIO's rows, with each segment's features, packed and not."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from modjax import adapters
from modjax.data import converters, pipeline, registry
from modjax.data.carry import DATASET_KEY, FLAG_BITS, key_of
from modjax.data.sources import ExamplesSource
from modjax.features import FeatureSpace
from modjax.models import EncoderDecoderModel, EncoderModel

FEATURES = {k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")}
STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
LENGTHS = {"inputs": 20, "targets": 12}


@pytest.fixture(scope="module", autouse=True)
def tasks():
    for name, language in (("cv_a", "a"), ("cv_b", ["b", "a"])):
        examples = [{"inputs": f"{name[-1]}{i}", "targets": "x" * (1 + i % 3)} for i in range(12)]
        registry.add_task(
            name,
            ExamplesSource({"train": examples}),
            STEPS,
            FEATURES,
            metadata={"task": "t", "language": language},
        )
    registry.add_mixture("cv_mix", ["cv_a", "cv_b"])
    yield
    for name in ("cv_mix", "cv_a", "cv_b"):
        registry.remove(name)


def tokens(rows):
    """Rows of token ids as a dataset of examples, all of task cv_a."""
    examples = [
        {"inputs": i, "targets": t, DATASET_KEY: [key_of("cv_a") << FLAG_BITS]} for i, t in rows
    ]
    spec = {k: tf.TensorSpec((None,), tf.int32) for k in (*LENGTHS, DATASET_KEY)}
    return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)


def test_packed_rows_are_those_of_seqio_and_inputs_shift_within_a_segment():
    ds = tokens([([7, 8, 1], [5, 6, 1]), ([9, 1], [4, 1]), ([3, 1], [8, 8, 8, 1])])
    space = registry.feature_space("cv_mix")
    ours = converters.EncDecFeatureConverter.bind(space, max_segments=4)(pack=True)
    (row,) = ours(ds, {"inputs": 9, "targets": 10}).as_numpy_iterator()
    np.testing.assert_array_equal(row["encoder_segment_ids"], [1, 1, 1, 2, 2, 3, 3, 0, 0])
    np.testing.assert_array_equal(row["decoder_target_tokens"], [5, 6, 1, 4, 1, 8, 8, 8, 1, 0])
    np.testing.assert_array_equal(row["decoder_input_tokens"], [0, 5, 6, 0, 4, 0, 8, 8, 8, 0])
    np.testing.assert_array_equal(row["decoder_positions"], [0, 1, 2, 0, 1, 0, 1, 2, 3, 0])
    assert row["features"].tolist() == [[1, 1, 0]] * 3 + [[0, 0, 0]]
    assert row["tasks"].tolist() == [1, 1, 1, 0]
    plain = seqio.EncDecFeatureConverter(pack=True)
    (expected,) = plain(ds, {"inputs": 9, "targets": 10}).as_numpy_iterator()
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)


@pytest.mark.parametrize("limit", [1, 2, 30])
def test_no_row_has_more_segments_than_the_limit_and_no_example_is_lost(limit):
    ds = tokens([([i + 3, 1], [i + 3, 1]) for i in range(23)])
    converter = converters.EncDecFeatureConverter(max_segments=limit)
    rows = list(converter(ds, {"inputs": 60, "targets": 60}).as_numpy_iterator())
    for row in rows:
        assert row[DATASET_KEY].shape == (limit,)
        assert row["encoder_segment_ids"].max() == np.count_nonzero(row[DATASET_KEY]) <= limit
    targets = np.concatenate([r["decoder_target_tokens"] for r in rows])
    np.testing.assert_array_equal(targets[targets > 1], np.arange(23) + 3)


def test_it_is_a_converter_class_for_seqio_and_t5x_packed_and_not():
    space = registry.feature_space("cv_mix")
    assert space.slots == (1, 2)
    converter_cls = converters.EncDecFeatureConverter.bind(space)
    assert issubclass(converter_cls, seqio.EncDecFeatureConverter)
    segments = converters.default_max_segments(LENGTHS)
    for converter, shape in (
        (converter_cls(pack=True, use_custom_packing_ops=False), (5, segments, 3)),
        (converter_cls(pack=False), (5, 1, 3)),
    ):
        ds = seqio.get_dataset("cv_mix", LENGTHS, converter, batch_size=5, seed=0, verbose=False)
        assert ds.element_spec["features"].shape == shape
        batch = next(ds.as_numpy_iterator())
        assert batch["features"].dtype == batch["tasks"].dtype == np.int32
        inputs = batch["encoder_input_tokens"]
        first = inputs[:, 0] - 3  # byte ids begin after pad, EOS and UNK
        languages = {"a": ["a"], "b": ["b", "a"]}
        for row, letter in enumerate(first):
            expected = {"task": "t", "language": languages[chr(letter)]}
            np.testing.assert_array_equal(batch["features"][row, 0], space.encode(expected))
            assert space.datasets[batch["tasks"][row, 0] - 1] == f"cv_{chr(letter)}"


def test_a_task_outside_the_space_is_an_error_or_none_as_asked():
    space = FeatureSpace((("task", ("t",)), ("language", ("b", "x"))), ("cv_b",), slots=(1, 2))
    ds = tokens([([7, 1], [5, 1])])
    make = converters.EncDecFeatureConverter
    with pytest.raises(ValueError, match="task 'cv_a': unknown value 'a' of feature 'language'"):
        make(False, space=space, tasks=["cv_a"])(ds, LENGTHS)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="cv_a.*unknown value .*a.* of feature"
    ):
        next(iter(make(False, space=space)(ds, LENGTHS)))
    (row,) = make(False, space=space, unknown="none")(ds, LENGTHS).as_numpy_iterator()
    assert row["features"].tolist() == [[1, 0, 0]] and row["tasks"].tolist() == [0]
    with pytest.raises(tf.errors.InvalidArgumentError, match="not registered"):
        next(iter(make(False, space=space, tasks=["cv_b"], unknown="none")(ds, LENGTHS)))


def test_the_same_examples_packed_and_not():
    space = registry.feature_space("cv_mix")
    packed, plain, where = pipeline.packed_and_not(
        "cv_mix", "train", space, task_feature_lengths=LENGTHS, num_examples=15
    )
    assert where.shape == (15, 2) and len(packed["tasks"]) < 15 == len(plain["tasks"])
    for i, (row, segment) in enumerate(where):
        for stream, name in (("encoder", "input"), ("decoder", "target"), ("decoder", "input")):
            ids = packed[f"{stream}_segment_ids"][row] == segment
            one = packed[f"{stream}_{name}_tokens"][row][ids]
            np.testing.assert_array_equal(one, plain[f"{stream}_{name}_tokens"][i][: len(one)])
            assert packed[f"{stream}_positions"][row][ids].tolist() == list(range(len(one)))
        np.testing.assert_array_equal(packed["features"][row, segment - 1], plain["features"][i, 0])
        assert packed["tasks"][row, segment - 1] == plain["tasks"][i, 0]
    assert (plain["decoder_loss_weights"] != 0).sum() == (packed["decoder_segment_ids"] > 0).sum()
    with pytest.raises(ValueError, match="max_segments"):
        converters.EncDecFeatureConverter(max_segments=0)


def test_a_model_names_the_converter_of_its_batches(make_t5):
    rules = (adapters.Rule(".*", adapters.Mixture("flix", router=adapters.Features())),)
    model = EncoderDecoderModel(adapters.Adapted(make_t5(), rules))
    bound = model.with_space(registry.feature_space("cv_mix"))
    ds = tokens([([7, 8, 1], [5, 6, 1])])
    (row,) = bound.FEATURE_CONVERTER_CLS(pack=True)(ds, LENGTHS).as_numpy_iterator()
    assert row["features"][0].tolist() == [1, 1, 0] and row["tasks"][0] == 1
    plain = EncoderDecoderModel(make_t5()).FEATURE_CONVERTER_CLS(pack=True)
    (row,) = plain(ds, LENGTHS).as_numpy_iterator()
    assert "features" not in row and row["decoder_target_tokens"][0] == 5


def test_a_decoders_packed_rows_hold_examples_one_behind_the_other_from_their_first_token():
    ds = tokens([([7, 8], [5, 6, 1]), ([9], [4, 1])])
    space = registry.feature_space("cv_mix")
    make = converters.DecoderOnlyFeatureConverter.starting_with(2).bind(space, max_segments=4)
    (row,) = make(pack=True)(ds, {"inputs": 4, "targets": 6}).as_numpy_iterator()
    # SeqIO opens the padding, too, with the first token.
    np.testing.assert_array_equal(row["decoder_input_tokens"], [2, 7, 8, 5, 6, 2, 9, 4, 2, 0])
    np.testing.assert_array_equal(row["decoder_target_tokens"], [7, 8, 5, 6, 1, 9, 4, 1, 0, 0])
    np.testing.assert_array_equal(row["decoder_loss_weights"], [0, 0, 1, 1, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(row["decoder_segment_ids"], [1, 1, 1, 1, 1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(row["decoder_positions"], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(row["decoder_causal_attention"], [1, 1, 1, 0, 0, 1, 1, 0, 0, 0])
    assert row["features"].tolist() == [[1, 1, 0]] * 2 + [[0, 0, 0]] * 2
    plain = seqio.PrefixLMFeatureConverter(pack=True, bos_id=2)
    (expected,) = plain(ds, {"inputs": 4, "targets": 6}).as_numpy_iterator()
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)


def test_a_decoders_examples_to_evaluate_hold_their_prompt_and_their_answer():
    make = converters.DecoderOnlyFeatureConverter.starting_with(2)
    batch, texts = next(
        pipeline.eval_batches(
            "cv_a",
            "train",
            registry.feature_space("cv_mix"),
            task_feature_lengths={"inputs": 3, "targets": 4},
            batch_size=2,
            converter=make,
        )
    )
    assert [text["inputs_pretokenized"] for text in texts] == ["a0", "a1"]
    letters = [*(ord(c) + 3 for c in "a1"), 1]
    assert batch["decoder_prompt_tokens"].tolist()[1] == [2, *letters]
    assert batch["decoder_answer_tokens"].tolist()[1] == [ord("x") + 3] * 2 + [1, 0]
    x = ord("x") + 3
    assert batch["decoder_input_tokens"].tolist()[1] == [2, *letters, x, x, 1]
    assert batch["decoder_target_tokens"].tolist()[1] == [*letters, x, x, 1, 0]
    assert batch["decoder_loss_weights"].tolist()[1] == [0, 0, 0, 1, 1, 1, 0]
    assert batch["features"].tolist() == [[[1, 1, 0]]] * 2


def test_an_encoders_rows_know_which_text_a_token_is_of():
    examples = [{"inputs": [5, 9, 8, 9, 6, 9], "targets": [2], DATASET_KEY: [key_of("cv_a") << 2]}]
    spec = {k: tf.TensorSpec((None,), tf.int32) for k in (*LENGTHS, DATASET_KEY)}
    ds = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)
    space = registry.feature_space("cv_mix")
    make = converters.ClassificationFeatureConverter.ending_with(9).bind(space)
    (row,) = make(pack=False)(ds, {"inputs": 8, "targets": 1}).as_numpy_iterator()
    assert row["encoder_input_tokens"].tolist() == [5, 9, 8, 9, 6, 9, 0, 0]
    assert row["encoder_token_types"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert row["labels"].tolist() == [2] and row["features"].tolist() == [[1, 1, 0]]
    with pytest.raises(ValueError, match="set pack = False"):
        make(pack=True)
    with pytest.raises(ValueError, match="set the length of targets to 1, not 12"):
        make(pack=False)(ds, LENGTHS)


def test_token_types_are_for_networks_that_have_them(make_encoder):
    """RoBERTa has one type, so that type 1 would be no row of its embedding."""
    for rows, expected in ((2, [0, 0, 1]), (1, [0, 0, 0])):
        model = EncoderModel(make_encoder(type_vocab_size=rows), separator_id=9)
        converter = model.converter(pack=False)
        task = {"inputs": np.array([5, 9, 6], np.int32), "targets": [1], "dataset_key": [4]}
        made = converter._convert_example({k: tf.constant(v) for k, v in task.items()})
        assert made["encoder_token_types"].numpy().tolist() == expected
