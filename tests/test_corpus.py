"""The corpus: what it keeps, how it merges, and that no accident costs it anything."""

import errno
import json
import shutil
import sys
import uuid
from pathlib import Path

import pytest

from rescnn_verify.case import Case
from rescnn_verify.corpus import LIMITS, Corpus, CorpusError, Kept, folder_of

NAME, OTHER = "shape.output_is_finite", "split.widths_sum_to_channels"


def kept(seed, why="corner", ratio=0.0, name=NAME):
    """A kept trial of one case."""
    return Kept(name, (Case(seed=seed),), why, ratio)


def corpus_in(folder, *entries):
    corpus = Corpus.read(folder)
    for entry in entries:
        assert corpus.add(entry)
    return corpus


def contents(folder):
    """Everything in a folder, hidden files too: the bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def full_disk(monkeypatch):
    """A function that fills the disk: a file gets half of its text, then the write fails."""

    def fill():
        write = Path.write_text

        def half(self, text, *arguments, **options):
            write(self, text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", half)

    yield fill


# --- files ---------------------------------------------------------------------------------------


def test_what_is_kept_is_read_again(tmp_path):
    trial = (Case(channels=5, kernel_sizes=(3, 5), extra=(("magnitude", float("inf")),)), Case())
    entry = Kept(NAME, trial, "tight", 0.75)
    corpus_in(tmp_path, entry)
    assert list(Corpus.read(tmp_path)) == [entry]


def test_equal_cases_have_equal_names_whatever_they_are_kept_for():
    assert kept(1).filename == kept(1, "tight", 0.5).filename
    names = {
        kept(1).filename,
        kept(2).filename,
        kept(1, name=OTHER).filename,
        Kept(NAME, (Case(seed=1), Case(seed=1)), "corner").filename,
    }
    assert len(names) == 4


def test_a_file_is_named_by_its_property_and_its_content(tmp_path):
    corpus_in(tmp_path, kept(1))
    (path,) = tmp_path.iterdir()
    assert path.name == kept(1).filename
    assert path.name.startswith(f"{NAME}-")
    assert path.suffix == ".json"


def test_a_case_that_is_there_is_not_kept_twice(tmp_path):
    corpus = corpus_in(tmp_path, kept(1))
    before = contents(tmp_path)
    assert not corpus.add(kept(1))
    assert not Corpus.read(tmp_path).add(kept(1))
    assert len(corpus) == 1
    assert contents(tmp_path) == before


def test_two_campaigns_share_a_folder(tmp_path):
    one, another = Corpus.read(tmp_path), Corpus.read(tmp_path)
    assert one.add(kept(1)) and another.add(kept(1)) and another.add(kept(2))
    assert {entry.trial[0].seed for entry in Corpus.read(tmp_path)} == {1, 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_made_where_there_is_none(tmp_path):
    folder = tmp_path / "a" / "b"
    assert len(Corpus.read(folder)) == 0
    assert folder.is_dir()


def test_a_folder_that_cannot_be_one_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "corpus"):
        with pytest.raises(CorpusError, match=r"corpus .*file.*: (File exists|Not a directory)"):
            Corpus.read(place)


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", LIMITS)
def test_of_each_kind_so_many_are_kept_and_no_more(why, tmp_path):
    corpus = corpus_in(tmp_path, *(kept(seed, why, 0.5) for seed in range(LIMITS[why])))
    assert not corpus.add(kept(99, why, 0.5))
    assert len(corpus) == len(Corpus.read(tmp_path)) == LIMITS[why]


def test_the_limits_are_of_each_property_and_each_kind_alone(tmp_path):
    tight = [kept(seed, "tight", 0.5) for seed in range(LIMITS["tight"])]
    corpus = corpus_in(tmp_path, *tight)
    assert corpus.add(kept(50, "corner"))
    assert corpus.add(kept(51, "failed"))
    assert corpus.add(kept(0, "tight", 0.5, name=OTHER))


def test_a_tighter_case_replaces_the_loosest(tmp_path):
    ratios = [0.5, 0.2, 0.9, 0.4]
    assert len(ratios) == LIMITS["tight"]
    corpus = corpus_in(tmp_path, *(kept(i, "tight", r) for i, r in enumerate(ratios)))
    assert not corpus.add(kept(10, "tight", 0.2))
    assert corpus.add(kept(11, "tight", 0.3))
    assert sorted(entry.ratio for entry in corpus) == [0.3, 0.4, 0.5, 0.9]
    assert sorted(entry.ratio for entry in Corpus.read(tmp_path)) == [0.3, 0.4, 0.5, 0.9]


def test_no_case_that_failed_gives_way_to_another(tmp_path):
    corpus = corpus_in(tmp_path, *(kept(seed, "failed") for seed in range(LIMITS["failed"])))
    before = contents(tmp_path)
    assert not corpus.add(kept(99, "failed", 5.0))
    assert contents(tmp_path) == before


# --- what runs first -----------------------------------------------------------------------------


def test_what_failed_comes_first_then_the_tight_then_the_corners(tmp_path):
    entries = [kept(1, "corner"), kept(2, "tight", 0.5), kept(3, "failed"), kept(4, "corner")]
    corpus_in(tmp_path, *entries, kept(7, "tight", 0.1, name=OTHER))
    trials = Corpus.read(tmp_path).trials()
    assert [trial[0].seed for trial in trials[NAME]][:2] == [3, 2]
    assert {trial[0].seed for trial in trials[NAME]} == {1, 2, 3, 4}
    assert trials[OTHER] == ((Case(seed=7),),)


def test_a_trial_of_several_cases_stays_whole(tmp_path):
    trial = tuple(Case(seed=seed, batch=3) for seed in (3, 1, 2))
    corpus_in(tmp_path, Kept(NAME, trial, "failed"))
    assert Corpus.read(tmp_path).trials() == {NAME: (trial,)}


# --- merging -------------------------------------------------------------------------------------


def test_corpora_merged_by_copying_their_files_read_as_their_union(tmp_path):
    left = [*(kept(seed, "failed") for seed in range(12)), kept(50, "tight", 0.5)]
    right = [*(kept(seed, "failed") for seed in range(8, 20)), kept(3, name=OTHER)]
    corpus_in(tmp_path / "left", *left)
    corpus_in(tmp_path / "right", *right)
    shutil.copytree(tmp_path / "right", tmp_path / "left", dirs_exist_ok=True)
    merged = Corpus.read(tmp_path / "left")
    assert set(merged) == {*left, *right}
    assert len(merged) == len(set(merged)) == 22  # 20 that failed, one tight, one corner
    assert merged.unreadable == []


# --- damage --------------------------------------------------------------------------------------


def _without(key):
    return json.dumps({k: v for k, v in json.loads(kept(1).dumps()).items() if k != key})


def _with(**changes):
    return json.dumps(json.loads(kept(1).dumps()) | changes)


DAMAGED = {
    "empty": b"",
    "cut off": kept(1).dumps().encode()[:-40],
    "binary": bytes(range(256)),
    "not JSON": b"channels = 3",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "nested without end": b"[" * 100_000,
    "a foreign object": b'{"name": "something else"}',
    "a bare case": Case().dumps().encode(),
    "another version": _with(version=2).encode(),
    "another reason": _with(why="because").encode(),
    "a reason of another type": _with(why=["failed"]).encode(),
    "no ratio": _without("ratio").encode(),
    "a ratio of another type": _with(ratio="high").encode(),
    "no trial": _without("trial").encode(),
    "an empty trial": _with(trial=[]).encode(),
    "a trial of another type": _with(trial=5).encode(),
    "a case with an unknown field": _with(trial=[{"version": 1, "depth": 3}]).encode(),
    "a case of another version": _with(trial=[{"version": 9}]).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_left_as_it_is_and_costs_nothing_else(damage, tmp_path):
    corpus_in(tmp_path, kept(1, "failed"), kept(2))
    (tmp_path / "damaged.json").write_bytes(damage)
    before = contents(tmp_path)
    corpus = Corpus.read(tmp_path)
    (complaint,) = corpus.unreadable
    path, _, reason = complaint.partition(": ")
    assert path == str(tmp_path / "damaged.json")
    assert reason
    assert {entry.trial[0].seed for entry in corpus} == {1, 2}
    assert corpus.add(kept(3))
    assert contents(tmp_path) == before | {kept(3).filename: kept(3).dumps().encode()}


def test_a_folder_named_like_a_case_is_named(tmp_path):
    (tmp_path / "folder.json").mkdir()
    corpus_in(tmp_path / "x", kept(1))
    assert Corpus.read(tmp_path).unreadable == [
        f"{tmp_path / 'folder.json'}: [Errno 21] Is a directory: '{tmp_path / 'folder.json'}'"
    ]


def test_files_of_another_kind_are_no_business_of_a_corpus(tmp_path):
    corpus_in(tmp_path, kept(1))
    (tmp_path / "README.md").write_text("what this folder is")
    corpus = Corpus.read(tmp_path)
    assert len(corpus) == 1
    assert corpus.unreadable == []


def test_a_write_that_fails_leaves_no_half_file(tmp_path, full_disk):
    corpus = corpus_in(tmp_path, kept(1))
    before = contents(tmp_path)
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        corpus.add(kept(2))
    assert contents(tmp_path) == before
    assert len(corpus) == 1


def test_a_tighter_case_that_cannot_be_written_costs_no_other(tmp_path, full_disk):
    corpus = corpus_in(tmp_path, *(kept(i, "tight", 0.1 * (i + 1)) for i in range(4)))
    before = contents(tmp_path)
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        corpus.add(kept(9, "tight", 0.9))
    assert contents(tmp_path) == before
    assert len(corpus) == 4


# --- elsewhere -----------------------------------------------------------------------------------


def test_a_path_is_a_folder_of_this_machine(tmp_path):
    assert folder_of(str(tmp_path)) == tmp_path
    assert isinstance(folder_of("corpus"), Path)


def test_a_corpus_lives_behind_a_url():
    url = f"memory://corpora/{uuid.uuid4().hex}"
    ratios = [0.5, 0.2, 0.9, 0.4]
    corpus_in(folder_of(url), kept(0, "failed"), *(kept(9, "tight", r, f"p.{r}") for r in ratios))
    corpus = Corpus.read(folder_of(url))
    assert [entry.why for entry in corpus].count("tight") == 4
    assert corpus.trials()[NAME] == ((Case(seed=0),),)
    (folder_of(url) / "damaged.json").write_text("{")
    (complaint,) = Corpus.read(folder_of(url)).unreadable
    assert "damaged.json" in complaint


def test_a_tighter_case_replaces_the_loosest_behind_a_url_too():
    url = f"memory://corpora/{uuid.uuid4().hex}"
    corpus = corpus_in(folder_of(url), *(kept(i, "tight", 0.1 * (i + 1)) for i in range(4)))
    assert corpus.add(kept(9, "tight", 0.9))
    assert sorted(entry.trial[0].seed for entry in Corpus.read(folder_of(url))) == [1, 2, 3, 9]


def test_a_url_without_the_extra_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(CorpusError, match=r"s3://bucket/x.*pip install 'rescnn-verify\[remote\]'"):
        folder_of("s3://bucket/x")


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://bucket/x"])
def test_a_url_that_nothing_here_can_read_is_refused_by_name(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # it may be installed
    with pytest.raises(CorpusError, match=url):
        Corpus.read(folder_of(url))
