from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.corpus import files
from reformer_lm.corpus.files import TextFile
from reformer_lm.corpus.token_files import find_tokenized_files, read_npz, read_token_text
from reformer_lm.errors import InputError

BEGIN = 4


def articles_of(ids: list[int]) -> list[list[int]]:
    """The slow way."""
    found: list[list[int]] = []
    for number in ids:
        if number == BEGIN or not found:
            found.append([])
        found[-1].append(number)
    return found


@given(
    ids=st.lists(st.sampled_from([0, 1, 2, BEGIN, BEGIN, 40, 21127]), max_size=40),
    separators=st.lists(st.sampled_from([" ", "\n", "  ", "\r\n", " \n"]), min_size=41, max_size=41),
    chunk=st.integers(1, 20),
)
def test_ids_in_text_are_cut_into_articles(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], separators: list[str], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("ids") / "tokenized_train_0.txt"
    text = "".join(f"{number}{separator}" for number, separator in zip(ids, separators, strict=False))
    path.write_text(text if chunk % 2 else text.strip(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        found = [article.tolist() for article in read_token_text(TextFile(path), BEGIN)]
    assert found == articles_of(ids)


@pytest.mark.parametrize("text", ["1 2 x3 4", "1 2 3.5", "1 2 99999999999999999999", "1 2 --"])
def test_what_is_no_id_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=f"a.txt: word 3 is '{text.split()[2]}', not a token id"):
        list(read_token_text(TextFile(tmp_path / "a.txt"), BEGIN))


def test_numbered_files(tmp_path: Path) -> None:
    assert find_tokenized_files(tmp_path) == []
    assert find_tokenized_files(tmp_path / "nowhere") == []
    for number in range(11):
        (tmp_path / f"tokenized_train_{number}.txt").touch()
    found = [path.name for path in find_tokenized_files(tmp_path)]
    assert found == [f"tokenized_train_{number}.txt" for number in range(11)]
    (tmp_path / "tokenized_train_3.txt").unlink()
    with pytest.raises(InputError, match=r"tokenized_train_3.txt: missing beside"):
        find_tokenized_files(tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint64])
def test_arrays_are_articles(tmp_path: Path, dtype: type) -> None:
    arrays = [[7, 8, 9], [BEGIN, 7, BEGIN, 8, 9], [], [5, BEGIN]]
    np.savez_compressed(tmp_path / "a.npz", *(np.array(array, dtype=dtype) for array in arrays))
    told: list[int] = []
    found = [article.tolist() for article in read_npz(tmp_path / "a.npz", BEGIN, told.append)]
    assert found == [[7, 8, 9], [BEGIN, 7], [BEGIN, 8, 9], [5], [BEGIN]]
    assert sum(told) > 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, 2]]), r"array 'arr_0' has shape \[1, 2\]"),
        (np.array([1.5]), "of float64"),
        (np.array([1, "a"], dtype=object), "allow_pickle|Object arrays"),
        (np.array([2**64 - 1], dtype=np.uint64), "no token id"),
    ],
)
def test_arrays_of_other_things_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez_compressed(tmp_path / "a.npz", array)
    with pytest.raises(InputError, match=message) as error:
        list(read_npz(tmp_path / "a.npz", BEGIN))
    assert str(error.value).startswith(f"{tmp_path / 'a.npz'}: ")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.arange(10_000))
    content = path.read_bytes()
    for damaged in (b"", b"abc", content[:-30], content[:200] + bytes(100) + content[300:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="no .npz archive that can be read"):
            list(read_npz(path, BEGIN))
    with pytest.raises(InputError, match="no such file"):
        read_npz(tmp_path / "missing.npz", BEGIN)
