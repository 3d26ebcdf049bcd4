"""What is kept for equal arguments."""

from modjax import memo


def counted(number):
    calls = []

    @memo.keep(number)
    def function(*args, **kwargs):
        calls.append((args, kwargs))
        return object()

    return function, calls


def test_equal_arguments_find_what_was_made_and_others_do_not():
    function, calls = counted(4)
    assert function((1, 2), name="a") is function((1, 2), name="a")
    assert function((1, 2), name="b") is not function((1, 2), name="a")
    assert len(calls) == 2


def test_the_oldest_is_forgotten():
    function, calls = counted(2)
    for value in (1, 2, 3, 1):
        function(value)
    assert len(calls) == 4


def test_what_cannot_be_hashed_is_made_anew_each_time():
    function, calls = counted(4)
    assert function([1]) is not function([1])
    assert function(1, by={}) is not function(1, by={})
    assert len(calls) == 4
