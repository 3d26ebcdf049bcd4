"""FeatureSpace: names to ids and back, extension, storage, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from modjax.features import FeatureSpace, UnknownFeatureError

SPACE = FeatureSpace(
    features=(("task", ("parse", "tag")), ("language", ("en", "sw", "hi")), ("family", ("a", "b"))),
    datasets=("parse_en", "tag_sw"),
    slots=(1, 1, 2),
)


def test_ids_count_from_one_and_columns_follow_the_slots():
    assert SPACE.names == ("task", "language", "family")
    assert SPACE.num_slots == 4
    assert SPACE.slot_features == ("task", "language", "family", "family")
    assert SPACE.values("language") == ("en", "sw", "hi") and SPACE.size("language") == 3
    assert [SPACE.id("language", v) for v in ("en", "sw", "hi")] == [1, 2, 3]
    assert SPACE.dataset_id("tag_sw") == 2


@pytest.mark.parametrize(
    ("metadata", "row"),
    [
        ({"task": "tag", "language": "sw", "family": ["b", "a"]}, [2, 2, 2, 1]),
        ({"task": "tag", "language": None, "family": "b"}, [2, 0, 2, 0]),
        ({"task": None, "language": "en", "family": []}, [0, 1, 0, 0]),
    ],
)
def test_encode_gives_one_id_per_slot_and_decode_returns_the_names(metadata, row):
    ids = SPACE.encode(metadata)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, row)
    family = metadata["family"]
    family = (family,) if isinstance(family, str) else tuple(family)
    assert SPACE.decode(ids) == {**metadata, "family": family}


def test_unknown_values_and_left_out_features_are_none_only_when_asked():
    metadata = {"language": "xx", "family": ["c", "b"]}
    np.testing.assert_array_equal(SPACE.encode(metadata, unknown="none"), [0, 0, 2, 0])
    with pytest.raises(UnknownFeatureError, match="task 'q': no feature 'task'"):
        SPACE.encode(metadata, where="task 'q'")
    with pytest.raises(UnknownFeatureError, match="task 'q': unknown value 'xx' of .*'language'"):
        SPACE.encode({"task": "tag", **metadata}, where="task 'q'")
    assert SPACE.dataset_id("nobody", "none") == 0


def test_unknown_names_are_errors_that_name_the_nearest():
    with pytest.raises(UnknownFeatureError, match="Did you mean 'language'"):
        SPACE.id("langage", "sw")
    with pytest.raises(UnknownFeatureError, match="Did you mean 'parse'"):
        SPACE.id("task", "prase")
    with pytest.raises(UnknownFeatureError, match="Did you mean 'tag_sw'"):
        SPACE.dataset_id("tag_sv")
    # Even where unknown values are none: a misspelt feature would be dropped in silence.
    with pytest.raises(UnknownFeatureError, match="Did you mean 'language'"):
        SPACE.encode({"langage": "sw"}, unknown="none")
    with pytest.raises(ValueError, match="Did you mean 'none'"):
        SPACE.encode({}, unknown="non")


def test_too_many_or_invalid_values_are_errors():
    with pytest.raises(ValueError, match="has 2 values.*room for 1"):
        SPACE.encode({"task": ["parse", "tag"], "language": None, "family": None})
    for bad in (3, "", [""], [None], b"en", {"en": 1}):
        with pytest.raises(ValueError, match="string"):
            SPACE.encode({"task": bad, "language": None, "family": None})
    with pytest.raises(ValueError, match="twice"):
        SPACE.encode({"task": None, "language": None, "family": ["a", "a"]})
    with pytest.raises(ValueError, match="twice"):
        FeatureSpace((("task", ("a", "a")),))
    with pytest.raises(ValueError, match="twice"):
        FeatureSpace((("task", ("a",)), ("task", ("b",))))
    with pytest.raises(ValueError, match="slots"):
        FeatureSpace((("task", ("a",)),), slots=(0,))
    with pytest.raises(ValueError, match="ids 0 to 2, not 3"):
        SPACE.decode([3, 0, 0, 0])
    with pytest.raises(ValueError, match="4 ids"):
        SPACE.decode([1, 1])


def test_from_metadata_keeps_the_order_of_first_sight_and_finds_the_slots():
    space = FeatureSpace.from_metadata(
        {
            "t1": {"task": "tag", "language": ["sw", "en"]},
            "t2": {"language": "hi", "task": "parse"},
        }
    )
    assert space.features == (("task", ("tag", "parse")), ("language", ("sw", "en", "hi")))
    assert space.slots == (1, 2) and space.datasets == ("t1", "t2")


def test_datasets_with_different_features_are_refused_naming_both():
    with pytest.raises(ValueError, match="'t1' and 't2'.*task.*language"):
        FeatureSpace.from_metadata({"t1": {"task": "a"}, "t2": {"language": "en"}})


def test_extension_keeps_every_old_id_and_repeats_nothing():
    more = SPACE.extend({"language": ["sw", "yo"], "script": ["latin"]}, ["tag_yo", "tag_sw"])
    for name in SPACE.names:
        for value in SPACE.values(name):
            assert more.id(name, value) == SPACE.id(name, value)
    assert more.id("language", "yo") == 4 and more.id("script", "latin") == 1
    assert more.datasets == ("parse_en", "tag_sw", "tag_yo")
    assert more.slots == (1, 1, 2, 1)
    assert more.extend({"language": ["yo"]}) == more
    reordered = FeatureSpace((("language", ("yo", "hi", "en")), ("task", ("tag",))), slots=(2, 1))
    merged = SPACE.merge(reordered)
    assert merged.values("language") == ("en", "sw", "hi", "yo") and merged.slots == (1, 2, 2)


def test_require_lists_all_that_is_lacking():
    SPACE.require(FeatureSpace((("language", ("hi", "en")),), datasets=("other",)))
    wanted = FeatureSpace((("language", ("en", "yo")), ("script", ("latin",))))
    with pytest.raises(
        UnknownFeatureError, match=r"(?s)checkpoint has no .*'yo'.*feature 'script'"
    ):
        SPACE.require(wanted, "the checkpoint")


def test_json_round_trip_and_hash():
    back = FeatureSpace.from_json(json.loads(json.dumps(SPACE.to_json())))
    assert back == SPACE and hash(back) == hash(SPACE)
    with pytest.raises(ValueError, match="version 99"):
        FeatureSpace.from_json({**SPACE.to_json(), "version": 99})
    with pytest.raises(ValueError, match="Not a feature space"):
        FeatureSpace.from_json({"features": []})
    with pytest.raises(ValueError, match="Damaged"):
        FeatureSpace.from_json({k: v for k, v in SPACE.to_json().items() if k != "slots"})


def test_needs_nothing_but_numpy():
    code = (
        "import sys, modjax.features;"
        "bad = {'jax', 'tensorflow', 'seqio', 'gin'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
