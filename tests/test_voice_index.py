"""The index of a voice's content: what is built, what is found, and what each wrong file is told."""

from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from conftest import VOICE, use_task

from common.config import UserError
from common.samples import BadFile

TASK = VOICE
use_task(VOICE)

import voice_index  # noqa: E402
from voice_index import build_index, index_of, read_index, retrieve, save_index, write_index  # noqa: E402


def vectors(count, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 7, 38, 39, 400, 3000])
def test_lists_follow_the_number_of_vectors(count):
    index = build_index(vectors(count))
    assert index.ntotal == count
    if count < 39:
        assert isinstance(index, faiss.IndexFlat)
    else:
        assert (index.nlist, index.nprobe) == (min(int(16 * count**0.5), count // 39), 1)


def test_many_vectors_become_the_centres_of_clusters(monkeypatch):
    monkeypatch.setattr(voice_index, "MOST_ROWS", 500)
    monkeypatch.setattr(voice_index, "CENTRES", 30)
    heaps = np.eye(3, 16, dtype=np.float32) * 10
    index = build_index(np.repeat(heaps, 200, axis=0) + 0.01 * vectors(600))
    centres = index.reconstruct_n(0, 30)
    far = np.linalg.norm(centres[:, None] - heaps, axis=2)
    assert index.ntotal == 30 and far.min(axis=1).max() < 0.1 and far.min(axis=0).max() < 0.1


def test_a_frame_is_drawn_to_its_nearest_by_the_inverse_of_squared_distance():
    known = vectors(20)
    asked = vectors(5, seed=1)
    distances = np.square(asked[:, None] - known).sum(axis=2)  # squared, as faiss gives them
    expected = []
    for row in distances:
        nearest = np.argsort(row)[:8]
        weights = 1 / row[nearest] ** 2
        expected.append(weights / weights.sum() @ known[nearest])
    index = build_index(known)
    np.testing.assert_allclose(retrieve(index, asked, 1.0), expected, atol=1e-4)
    np.testing.assert_allclose(retrieve(index, asked, 0.25), 0.75 * asked + 0.25 * np.array(expected), atol=1e-4)
    np.testing.assert_array_equal(retrieve(index, asked, 0.0), asked)


@pytest.mark.parametrize("count", [1, 3, 20, 400])
def test_a_frame_that_equals_a_vector_becomes_that_vector(count):
    """At a distance of zero; also where there are fewer than eight neighbours, in all or in the list that is searched."""
    known = vectors(count)
    known[0] = 0
    near = retrieve(build_index(known), known[:3], 1.0)
    np.testing.assert_allclose(near, known[:3], atol=1e-5)


def test_a_list_without_vectors_leaves_frames_as_they_are():
    index = faiss.index_factory(16, "IVF2,Flat")
    index.train(np.concatenate([vectors(80) + 100, vectors(80) - 100]))
    index.add(vectors(5) + 100)
    asked = vectors(3) - 100
    np.testing.assert_array_equal(retrieve(index, asked, 1.0), asked)


def test_an_index_is_read_as_it_was_written_under_any_name(tmp_path):
    folder = tmp_path / "голос 声"
    folder.mkdir()
    index, asked = build_index(vectors(400)), vectors(5, seed=1)
    write_index(folder / "añadido.index", index)
    assert [path.name for path in folder.iterdir()] == ["añadido.index"]
    found = read_index(folder / "añadido.index", 16)
    np.testing.assert_array_equal(retrieve(found, asked, 0.7), retrieve(index, asked, 0.7))


def test_a_file_that_asks_for_every_list_has_one_searched(tmp_path):
    index = build_index(vectors(400))
    index.nprobe = 10
    write_index(tmp_path / "a.index", index)
    assert read_index(tmp_path / "a.index", 16).nprobe == 1


def stored(index):
    return faiss.serialize_index(index).tobytes()


def of_kind(kind, metric=faiss.METRIC_L2, content=None):
    index = faiss.index_factory(16, kind, metric)
    index.train(vectors(200))
    index.add(vectors(200) if content is None else content)
    return stored(index)


WRONG = {
    "of another width": (lambda: stored(build_index(vectors(50, width=8))), "8 wide, not 16"),
    "without vectors": (lambda: stored(faiss.IndexFlatL2(16)), "no vectors in it"),
    "trained alone": (lambda: of_kind("IVF4,Flat", content=vectors(0)), "no vectors in it"),
    "untrained": (lambda: stored(faiss.index_factory(16, "IVF4,Flat")), "not trained"),
    "text": (lambda: b"this is no index\n", "no faiss index"),
    "short": (lambda: b"IxF2", "wide, not 16"),
    "empty": (lambda: b"", "is empty"),
    "cut": (lambda: stored(build_index(vectors(400)))[:9000], "is cut"),
    "cut near its end": (lambda: stored(build_index(vectors(400)))[:-9], "damaged or cut"),
    "a graph": (lambda: of_kind("HNSW8"), "another kind (IHNf)"),
    "compressed": (lambda: of_kind("IVF4,SQ8"), "another kind (IwSq)"),
    "by product": (lambda: of_kind("IVF4,Flat", faiss.METRIC_INNER_PRODUCT), "another measure"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_told_what_it_is_in_one_line(name, tmp_path):
    make, words = WRONG[name]
    (tmp_path / "a.index").write_bytes(make())
    with pytest.raises(UserError) as caught:
        read_index(tmp_path / "a.index", 16)
    said = str(caught.value)
    assert words in said and "a.index" in said and "\n" not in said and ".cpp" not in said


def test_the_file_with_vectors_is_named_beside_the_one_without(tmp_path):
    (tmp_path / "trained_IVF4_v2.index").write_bytes(WRONG["trained alone"][0]())
    (tmp_path / "added_IVF4_v2.index").write_bytes(of_kind("IVF4,Flat"))
    with pytest.raises(UserError, match="take added_IVF4_v2.index beside it"):
        read_index(tmp_path / "trained_IVF4_v2.index", 16)
    with pytest.raises(UserError, match="cannot read the index .*nowhere.index: No such file"):
        read_index(tmp_path / "nowhere.index", 16)


def test_content_that_is_none_makes_no_index():
    for content in (np.zeros((0, 16)), np.zeros(16)):
        with pytest.raises(UserError, match="needs content"):
            build_index(content)


def test_a_run_has_every_second_frame_of_its_clips_in_its_index(tmp_path):
    best = tmp_path / "checkpoints" / "best"
    best.mkdir(parents=True)
    assert index_of(best) is None
    contents = [np.repeat(vectors(30, seed=seed), 2, axis=0) for seed in range(2)]
    clips = [SimpleNamespace(load=lambda hop, content=content: (None, content, None)) for content in contents]
    clips.insert(1, SimpleNamespace(load=broken))
    voice = SimpleNamespace(config=SimpleNamespace(hop=160))
    save_index(tmp_path / "voice.index", SimpleNamespace(clips=clips, voice=voice))
    assert index_of(best) == index_of(tmp_path) == tmp_path / "voice.index"
    found = read_index(index_of(best), 16)
    assert found.ntotal == 60
    np.testing.assert_array_equal(found.reconstruct_n(30, 1)[0], contents[1][0])


def broken(hop):
    raise BadFile("damaged")


def test_a_file_far_longer_than_its_vectors_is_not_read(tmp_path):
    path = tmp_path / "voice.index"
    write_index(path, build_index(vectors(20)))
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no place on the disk
    with pytest.raises(UserError, match="is damaged: 1,099,511,627,776 bytes for 20 vectors"):
        read_index(path, 16)
