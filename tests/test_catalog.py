"The catalogue: every row, a download that is treated badly, and adapters on files that imitate the published ones."
import builtins
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from typer.testing import CliRunner

from biojepa import download
from biojepa.download import Unchecked
from biojepa.catalog import (
    MAGIC,
    BadDataset,
    BadDownload,
    adapt,
    dataset,
    datasets,
    entries,
    entry,
    fetch,
    get,
    home,
    pick,
    read,
    show,
    unpack,
)
from biojepa.cells import BadCells, CONTROL, MODES, check, dense
from biojepa.cli import app

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*cells left out",
    "ignore:.*no checksum was published",
    "ignore:.*are not measured",
    "ignore:Variable names are not unique",
    "ignore:Observation names",
)
ROWS = [
    "replogle_k562_essential",
    "replogle_k562_gwps",
    "replogle_rpe1",
    "norman",
    "adamson",
    "sciplex",
    "tahoe",
    "mcfaline",
    "papalexi",
    "dixit",
    "kang",
    "nadig_hepg2",
    "nadig_jurkat",
]
QUICK = dict(wait=0, progress=False, timeout=5)
BODY = MAGIC[".h5ad"] + np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8).tobytes()


# the list

def test_every_row_is_there():
    assert list(entries()) == ROWS and list(datasets().index) == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    "What it is, why, where, how large, what to beware of; and no field that only looks filled."
    e = entry(name)
    text = show(name)
    assert (
        e.mode in MODES[1:] and e.cells > 1000 and e.genes if name != "mcfaline" else e.cells > 1000
    )
    assert (
        re.fullmatch(r"10\.\d{4,}/\S+", e.doi) and e.licence and re.search(r"20(1|2)\d", e.citation)
    )
    assert len(e.what) > 30 and len(e.why) > 30 and len(e.traps) >= 3 and e.lines
    for words in (e.title, e.what, e.why, e.doi, *e.traps): assert words in text
    assert len({s.name for s in e.sources}) == len(e.sources)
    for s in e.sources:
        assert (
            s.kind in ("counts", "log1p")
            and Path(s.file).suffix in MAGIC
            and (s.url or name == "kang")
        )
        assert s.url is None or s.url.startswith("https://")
        assert s.hash is None or re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", s.hash)
        assert s.map["perturbation"] and s.map["control"] and (s.url or "no address") in text
    assert ("not published" in text) == any(
        x is None
        for x in (
            e.cells,
            e.genes,
            e.perturbations,
            *(v for s in e.sources for v in (s.hash, s.size or s.total_size)),
        )
    ) or e.licence == "not published"


def test_gears_files_are_known_to_be_logged():
    gears = [(e, s) for e in entries().values() for s in e.sources if s.name == "GEARS"]
    assert len(gears) == 5 and all(s.kind == "log1p" for _, s in gears)
    assert all("log-normalised" in " ".join(e.traps) for e, _ in gears)


@pytest.mark.parametrize(
    "typo, nearest",
    [
        ("nroman", "norman"),
        ("papalexy", "papalexi"),
        ("replogle", "replogle_rpe1"),
        ("k562", "replogle_k562_gwps"),
        ("sci-plex", "sciplex"),
        ("tahoe-100m", "tahoe"),
        ("jurkat", "nadig_jurkat"),
        ("hepg2", "nadig_hepg2"),
        ("Tahoe-100M", "tahoe"),
        ("Srivatsan", "sciplex"),
        ("srivatsan 2020", "sciplex"),
        ("Replogle 2022", "replogle_rpe1"),
        ("norman 2019", "norman"),
        ("Srivatsan2020", "sciplex"),
        ("Zhang 2025", "tahoe"),
        ("RPE-1", "replogle_rpe1"),
        ("THP-1", "papalexi"),
        ("genome-wide K562", "replogle_k562_gwps"),
        ("eccite-seq", "papalexi"),
        ("GSE133344", "norman"),
        ("McFaline-Figueroa 2024", "mcfaline"),
    ],
)
def test_a_typo_gets_the_nearest_names(typo, nearest):
    with pytest.raises(BadDataset, match=f"{typo!r}; did you mean.*{nearest}"): entry(typo)


def test_a_name_like_nothing_gets_them_all_and_a_source_its_siblings():
    with pytest.raises(BadDataset, match="there are replogle_k562_essential, .*nadig_jurkat"):
        entry("qqqq")
    with pytest.raises(
        BadDataset, match="no source 'zenodo'; it has scPerturb, GEARS, PerturBench"
    ):
        pick("norman", "zenodo")
    assert pick("norman", "gears").name == "GEARS"


# a server that misbehaves on request

class Server:
    """Serves `files`; `plan` holds, by path, what to do for the first calls:

    a function of (handler, body), or None to behave.
    """
    def __init__(self, ranges=True):
        self.files = {}
        self.plan = {}
        self.asked = []
        self.tag = '"v1"'
        self.ranges = ranges
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *a): pass

            def do_GET(self):
                path = self.path.lstrip("/")
                first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                outer.asked.append((path, first))
                todo = outer.plan.get(path) or []
                body = outer.files.get(path)
                if todo and (act := todo.pop(0)): return act(self, body)
                if body is None:
                    return outer.answer(self, 404, b"nothing", {"Content-Type": "text/plain"})
                if not outer.ranges or self.headers.get("If-Range", outer.tag) != outer.tag:
                    first = 0
                if first >= len(body) and first:
                    return outer.answer(self, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
                more = (
                    {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if first else {}
                )
                outer.answer(self, 206 if first else 200, body[first:], {"ETag": outer.tag, **more})

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @staticmethod
    def answer(h, code, body, headers=None, length=None):
        h.send_response(code)
        for k, v in {
            "Content-Type": "application/octet-stream",
            **(headers or {}),
            "Content-Length": length or len(body),
        }.items():
            h.send_header(k, str(v))
        h.end_headers()
        h.wfile.write(body)

    def cut(self, keep):
        "Hang up after `keep` bytes of what was asked."
        def act(h, body):
            first = int((h.headers.get("Range") or "bytes=0-")[6:-1])
            more = {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if first else {}
            self.answer(
                h,
                206 if first else 200,
                body[first : first + keep],
                {"ETag": self.tag, **more},
                len(body) - first,
            )
        return act


@pytest.fixture
def server():
    s = Server()
    s.files["a.h5ad"] = BODY
    yield s
    s.http.shutdown()
    s.http.server_close()


MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


def test_whole_and_not_twice(server, tmp_path):
    path = fetch(f"{server.url}/a.h5ad", tmp_path / "x/a.h5ad", MD5, len(BODY), **QUICK)
    assert path.read_bytes() == BODY and server.asked == [("a.h5ad", 0)]
    fetch(f"{server.url}/a.h5ad", path, MD5, len(BODY), **QUICK)
    assert (
        len(server.asked) == 1
        and not list(tmp_path.rglob("*.part"))
        and not list(tmp_path.rglob("*.tag"))
    )


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "a.h5ad").write_bytes(BODY[:-1] + b"?")
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )
    # no checksum published, but a size
    (tmp_path / "a.h5ad").write_bytes(BODY[:100])
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, len(BODY), **QUICK).read_bytes()
        == BODY
    )


def test_a_cut_line_goes_on(server, tmp_path):
    server.plan["a.h5ad"] = [server.cut(200_000), server.cut(200_000)]
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )
    starts = [at for _, at in server.asked]
    assert (
        starts[0] == 0
        and 100_000 < starts[1] <= 200_000 < starts[2] <= 400_000
        and len(starts) == 3
    )


def test_a_killed_run_goes_on_where_it_stopped(server, tmp_path):
    "The part outlives the call: the next one asks for the rest only."
    server.plan["a.h5ad"] = [server.cut(300_000)] + [server.cut(0)] * 20
    with pytest.raises(
        BadDownload, match="cut .* times without progress at .* call again to go on"
    ):
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK)
    assert (
        not (tmp_path / "a.h5ad").exists() and (tmp_path / "a.h5ad.part").stat().st_size > 200_000
    )
    server.plan.clear()
    server.asked.clear()
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )
    assert len(server.asked) == 1 and server.asked[0][1] > 200_000


def test_two_versions_are_never_glued(server, tmp_path):
    server.plan["a.h5ad"] = [server.cut(300_000)] + [server.cut(0)] * 20
    with pytest.raises(BadDownload):
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, **QUICK)
    server.plan.clear()
    server.tag, server.files["a.h5ad"] = (
        '"v2"',
        BODY[::-1].replace(BODY[::-1][:8], MAGIC[".h5ad"], 1),
    )
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, **QUICK).read_bytes()
        == server.files["a.h5ad"]
    )


def test_a_server_without_ranges_starts_over(tmp_path):
    s = Server(ranges=False)
    s.files["a.h5ad"] = BODY
    s.plan["a.h5ad"] = [s.cut(300_000)]
    assert (
        fetch(f"{s.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes() == BODY
    )
    # it was asked for the rest, and sent all
    assert s.asked[1][1] > 0


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    (tmp_path / "a.h5ad.part").write_bytes(BODY)
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )
    # of another, longer file
    (tmp_path / "b.h5ad.part").write_bytes(BODY + b"longer")
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "b.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(BadDownload, match="a.h5ad is not what was published"):
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", "md5:" + "0" * 32, len(BODY), **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad.lock"]


def page(h, body):
    Server.answer(
        h,
        200,
        b"<!doctype html><html><title>Sign in</title><p>Please sign in",
        {"Content-Type": "text/html; charset=utf-8"},
    )
def empty(h, body): Server.answer(h, 202, b"")
def gone(h, body): Server.answer(h, 404, b"gone")
def secret_page(h, body): Server.answer(h, 200, b"<!doctype html><html>oops")
def busy(h, body): Server.answer(h, 503, b"later")


@pytest.mark.parametrize(
    "act, says",
    [
        (page, "sends a web page instead of a.h5ad .'Sign in Please sign in'"),
        (empty, "answers 202"),
        (gone, "answers 404"),
        (secret_page, "no .h5ad file: it begins with b'<!doctype html>"),
    ],
)
def test_something_else_than_data(server, tmp_path, act, says):
    """A word that names the file and the way round; nothing under the final name; no second try,
    as it would not help."""
    server.plan["a.h5ad"] = [act]
    with pytest.raises(BadDownload, match=says) as e:
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK)
    assert "in a browser and put it at" in str(e.value) and len(server.asked) == 1
    assert not (tmp_path / "a.h5ad").exists() and not (tmp_path / "a.h5ad.part").exists()


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.plan["a.h5ad"] = [busy, busy]
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )


def test_offline_says_so(tmp_path, monkeypatch):
    "After three tries, not after six with ever longer waits."
    waits = []
    s = Server()
    s.http.shutdown()
    s.http.server_close()
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(
        BadDownload,
        match="cannot reach 127.0.0.1.*is this machine online.*in a browser and put it at",
    ):
        fetch(f"{s.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), progress=False, timeout=5)
    assert waits == [1.0, 2.0]


def test_no_room(server, tmp_path, monkeypatch):
    """Known before the first byte when the size is published, and from the server's own word when
    it is not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(
        BadDownload,
        match=(
            "a.h5ad needs 600.0 kB more, and .* has 1.0 kB left; make room, or choose "
            "another folder .*BIOJEPA_DATA"
        ),
    ):
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK)
    assert not server.asked
    with pytest.raises(BadDownload, match="make room"):
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, **QUICK)
    assert len(server.asked) == 1 and not (tmp_path / "a.h5ad").exists()


def test_what_is_there_already_needs_no_room(server, tmp_path, monkeypatch):
    (tmp_path / "a.h5ad.part").write_bytes(BODY[:-10])
    (tmp_path / "a.h5ad.tag").write_text('"v1"')
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=2 << 20))
    assert (
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK).read_bytes()
        == BODY
    )


def test_parallel_callers_download_once(server, tmp_path):
    "Threads here, processes too: one fetches, the others wait and find the file."
    def slow(h, body):
        import time
        time.sleep(0.5)
        Server.answer(h, 200, body, {"ETag": server.tag})
    server.plan["a.h5ad"] = [slow]
    program = (
        "from biojepa.catalog import fetch; "
        f"print(len(fetch({server.url + '/a.h5ad'!r}, {str(tmp_path / 'a.h5ad')!r}, "
        f"{MD5!r}, {len(BODY)}, wait=0, progress=False).read_bytes()))"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                fetch(
                    f"{server.url}/a.h5ad", tmp_path / "a.h5ad", MD5, len(BODY), **QUICK
                ).read_bytes()
            )
        )
        for _ in range(4)
    ]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [p.communicate()[0].strip() for p in others] == [str(len(BODY))] * 2
    assert found == [BODY] * 4 and len(server.asked) == 1


def test_packages(tmp_path):
    (tmp_path / "a.h5ad.gz").write_bytes(gzip.compress(BODY))
    assert (
        unpack(tmp_path / "a.h5ad.gz").read_bytes() == BODY
        and not (tmp_path / "a.h5ad.part").exists()
    )
    with zipfile.ZipFile(tmp_path / "n.zip", "w") as z:
        z.writestr("norman/perturb_processed.h5ad", BODY)
        z.writestr("norman/notes.txt", "x")
    assert (
        unpack(tmp_path / "n.zip") == tmp_path / "n.h5ad"
        and (tmp_path / "n.h5ad").read_bytes() == BODY
    )
    (tmp_path / "b.h5ad.gz").write_bytes(gzip.compress(BODY)[:-1000])
    with pytest.raises(BadDownload, match="b.h5ad.gz cannot be unpacked"):
        unpack(tmp_path / "b.h5ad.gz")
    assert not (tmp_path / "b.h5ad").exists()
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as z:
        z.writestr("a.h5ad", BODY)
        z.writestr("b.h5ad", BODY)
    with pytest.raises(BadDownload, match="two.zip holds 2 h5ad files"):
        unpack(tmp_path / "two.zip")


def test_a_package_that_is_damaged_inside(tmp_path):
    "gzip calls some damage a zlib.error, which is no OSError."
    letters = np.random.default_rng(0).integers(0, 64, 100_000, dtype=np.uint8).tobytes()
    for at in range(2000, 60_000, 4000):
        broken = bytearray(gzip.compress(letters))
        broken[at:at + 8] = b"\xff" * 8
        (tmp_path / "b.h5ad.gz").write_bytes(broken)
        with pytest.raises(BadDownload, match="b.h5ad.gz cannot be unpacked"):
            unpack(tmp_path / "b.h5ad.gz")
        assert not (tmp_path / "b.h5ad.part").exists() and not (tmp_path / "b.h5ad").exists()


def test_what_a_killed_run_left_takes_no_room(tmp_path, monkeypatch):
    half = tmp_path / "g.h5ad.part"
    with gzip.open(tmp_path / "g.h5ad.gz", "wb") as z: z.write(BODY)
    half.write_bytes(b"half of it")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: SimpleNamespace(free=1000 if half.exists() else 1 << 30)
    )
    assert unpack(tmp_path / "g.h5ad.gz").read_bytes() == BODY and not half.exists()


def test_no_room_to_unpack(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "n.zip", "w") as z:
        z.writestr("norman/perturb_processed.h5ad", BODY)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(BadDownload, match="n.h5ad needs 600.0 kB more"): unpack(tmp_path / "n.zip")
    with gzip.open(tmp_path / "g.h5ad.gz", "wb") as z: z.write(BODY)
    with pytest.raises(BadDownload, match="g.h5ad needs 600.. kB more"):
        unpack(tmp_path / "g.h5ad.gz")


def full_after(monkeypatch, n):
    "A disk that is full once n bytes were written to a .part file."
    plain = builtins.open
    def opened(path, mode="r", *a, **k):
        f = plain(path, mode, *a, **k)
        if not str(path).endswith(".part") or "r" in mode: return f
        class Full:
            def __enter__(self): return self
            def __exit__(self, *x): f.close()
            def write(self, b):
                if f.tell() + len(b) > n: raise OSError(errno.ENOSPC, "No space left on device")
                return f.write(b)
        return Full()
    monkeypatch.setattr("biojepa.download.open", opened, raising=False)


def test_a_disk_that_fills_meanwhile(server, tmp_path, monkeypatch):
    with gzip.open(tmp_path / "g.h5ad.gz", "wb") as z: z.write(BODY)
    server.files["a.h5ad"] = BODY
    with monkeypatch.context() as m:
        full_after(m, 200_000)
        with pytest.raises(BadDownload, match="is full: no room for g.h5ad; make room"):
            unpack(tmp_path / "g.h5ad.gz")
        assert not (tmp_path / "g.h5ad.part").exists()
        def no_tag(self, text): raise OSError(errno.ENOSPC, "No space left on device")
        with m.context() as full:
            full.setattr(Path, "write_text", no_tag)
            with pytest.raises(BadDownload, match="is full: no room for b.h5ad"):
                fetch(f"{server.url}/a.h5ad", tmp_path / "b.h5ad", None, **QUICK)
        with pytest.raises(BadDownload, match="is full: no room for a.h5ad.*what has come is kept"):
            fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, **QUICK)
    kept = (tmp_path / "a.h5ad.part").stat().st_size
    assert 0 < kept <= 200_000
    # goes on from there
    assert fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", None, **QUICK).read_bytes() == BODY
    assert unpack(tmp_path / "g.h5ad.gz").read_bytes() == BODY


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("BIOJEPA_DATA", str(tmp_path))
    assert home() == tmp_path / "catalog"
    monkeypatch.delenv("BIOJEPA_DATA")
    assert home().name == "biojepa" and home().is_absolute()


# small files that imitate the published ones: columns, types, storage, odd names

GENES = [
    "KLF1",
    "MAP2K6",
    "TBCE",
    "STAT1",
    "JAK2",
    "ELK1",
    "MT-CO1",
    "RP11-34P13.8",
    "HLA-A",
    "ENSG00000228463",
]
ENSEMBL = [f"ENSG{i:011d}" for i in range(len(GENES))]


def counts(n, seed=0, genes=len(GENES)):
    return (np.random.default_rng(seed).poisson(3, (n, genes)) + np.eye(n, genes)).astype(
        np.float32
    )
def barcodes(n, suffix="-1"): return [f"AAAC{i:012d}{suffix}" for i in range(n)]


def scperturb(labels, storage=sparse.csc_matrix, **columns):
    "The columns that scPerturb adds to every file; symbols as the index, ensembl_id beside."
    X = counts(len(labels))
    obs = pd.DataFrame(
        {
            **columns,
            "perturbation": pd.Categorical(labels),
            "tissue_type": "cell_line",
            "cancer": True,
            "disease": "chronic myelogenous leukemia",
            "perturbation_type": "CRISPR",
            "organism": "human",
            "nperts": 1,
            "ngenes": (X > 0).sum(1),
            "ncounts": X.sum(1),
            "percent_mito": 1.5,
            "percent_ribo": 9.5,
        },
        index=pd.Index(barcodes(len(labels)), name="cell_barcode"),
    )
    var = pd.DataFrame(
        {"ensembl_id": ENSEMBL, "ncounts": X.sum(0), "ncells": (X > 0).sum(0)},
        index=pd.Index(GENES, name="gene_symbol"),
    )
    return AnnData(storage(X) if storage else X, obs=obs, var=var)


def replogle_obs(labels, gem):
    n = len(labels)
    return pd.DataFrame(
        {
            gem: np.arange(n) % 3 + 1,
            "gene": pd.Categorical(labels),
            "gene_id": pd.Categorical([f"ENSG{hash(l) % 9999:011d}" for l in labels]),
            "transcript": pd.Categorical(["P1P2"] * n),
            "gene_transcript": pd.Categorical([f"{i}_{l}_P1P2" for i, l in enumerate(labels)]),
        }
    )


def authors(labels):
    """As the Weissman laboratory publishes:

    dense, Ensembl index, gene_name with TBCE twice, guide pairs in sgID_AB.
    """
    obs = replogle_obs(labels, "gem_group").assign(
        sgID_AB=pd.Categorical([f"{l}_+_1.23-P1P2|{l}_-_4.56-P1P2" for l in labels]),
        mitopercent=0.05,
        UMI_count=30.0,
        z_gemgroup_UMI=0.0,
        core_scale_factor=1.0,
        core_adjusted_UMI_count=30.0,
    )
    obs.index = pd.Index(barcodes(len(labels), "-34"), name="cell_barcode")
    names = GENES[:-1] + ["TBCE"]
    var = pd.DataFrame(
        {
            "gene_name": pd.Categorical(names),
            "chr": "chr1",
            "start": 1,
            "end": 2,
            "class": "gene_version10",
            "strand": "+",
            "length": 1,
            "in_matrix": True,
            "mean": 1.0,
            "std": 1.0,
            "cv": 1.0,
            "fano": 1.0,
        },
        index=pd.Index(ENSEMBL, name="gene_id"),
    )
    return AnnData(counts(len(labels)), obs=obs, var=var)


def scperturb_replogle(labels, line):
    a = authors(labels)
    a.obs = a.obs.rename(
        columns={"mitopercent": "percent_mito", "sgID_AB": "guide_id", "gem_group": "batch"}
    ).assign(
        disease="chronic myeloid leukemia",
        cancer=True,
        cell_line=line,
        sex="Female",
        age=53,
        perturbation=a.obs.gene.cat.rename_categories({"non-targeting": "control"}),
        organism="human",
        perturbation_type="CRISPR",
        tissue_type="cell_line",
        ncounts=a.X.sum(1),
        ngenes=(a.X > 0).sum(1),
        nperts=1,
        percent_ribo=0.1,
    )
    a.var["ensembl_id"] = a.var_names
    names = a.var.gene_name.astype(str)
    a.var_names = pd.Index(
        [f"TBCE_{i}" if n == "TBCE" else n for n, i in zip(names, ENSEMBL)], name="gene_name"
    )
    del a.var["gene_name"]
    return a


def gears(labels, line, layer=False, more=False):
    "As GEARS packages: log-normalised X, five columns of obs, gene_name beside an Ensembl index."
    X = counts(len(labels))
    total = X.sum(1, keepdims=True) + 40  # genes that were left out
    name = [f"{line}_{l}_{'1+1' if '+' in l else '1'}" for l in labels]
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(labels),
            "cell_type": pd.Categorical([line] * len(labels)),
            "dose_val": pd.Categorical(["1+1" if "+" in l else "1" for l in labels]),
            "control": np.array([l == "ctrl" for l in labels], dtype=np.int64),
            "condition_name": pd.Categorical(name),
        },
        index=pd.Index(barcodes(len(labels)), name="cell_barcode"),
    )
    if more: obs.insert(2, "cov_drug_dose_name", pd.Categorical(name))
    a = AnnData(
        sparse.csr_matrix(np.log1p(X / total * 1e4).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(
            {"gene_name": pd.Categorical(GENES)}, index=pd.Index(ENSEMBL, name="gene_id")
        ),
    )
    if layer: a.layers["counts"] = sparse.csr_matrix(X)
    a.uns["non_zeros_gene_idx"] = {n: np.arange(3) for n in set(name)}
    return a


def perturbench(labels, name, lines, treatments):
    X = counts(len(labels))
    total = X.sum(1) + 40
    obs = pd.DataFrame(
        {
            "ncounts": total.astype(float),
            "ngenes": (X > 0).sum(1).astype(np.int32),
            "condition": pd.Categorical(labels),
            "perturbation": pd.Categorical(labels),
            "perturbation_type": pd.Categorical(["CRISPR"] * len(labels)),
            "dataset": pd.Categorical([name] * len(labels)),
            "cell_type": pd.Categorical(lines),
            "treatment": pd.Categorical(treatments),
        },
        index=[f"03C_F03_RT_BC_{i}_Lig_BC_{i}" for i in range(len(labels))],
    )
    a = AnnData(
        sparse.csr_matrix(np.log1p(X / total[:, None] * 1e4)),
        obs=obs,
        var=pd.DataFrame({"highly_variable": True}, index=pd.Index(GENES, name="gene_symbol")),
    )
    a.layers["counts"] = sparse.csr_matrix(X)
    a.uns["log1p"] = {}
    return a


def sciplex():
    labels = ["control"] * 6 + ["(+)-JQ1"] * 3 + ["Quisinostat (JNJ-26481585) 2HCl"] * 3 + [np.nan]
    a = scperturb(labels, sparse.csr_matrix)
    n = len(labels)
    a.obs = a.obs.assign(
        cell_line=pd.Categorical((["A549", "K562"] * n)[:n]),
        dose_value=[0.0] * 6 + [10.0, 100, 10000] * 2 + [np.nan],
        dose_unit="nM",
        time=[24.0] * 6 + [72.0] * 3 + [24.0] * 3 + [np.nan],
        replicate=pd.Categorical([*(["rep1", "rep2"] * n)[: n - 1], np.nan]),
        plate=pd.Categorical([*["plate1"] * (n - 1), np.nan]),
        well="A1",
        pathway_level_1="Epigenetic",
    )
    a.var_names = pd.Index([*GENES[:-1], "STAT1:1"], name="gene_symbol")
    return a


def kang():
    labels = (["ctrl"] * 3 + ["stim"] * 3) * 2
    obs = pd.DataFrame(
        {
            "nCount_RNA": 3017.0,
            "nFeature_RNA": 877,
            "tsne1": 0.1,
            "tsne2": 0.2,
            "label": pd.Categorical(labels),
            "cluster": 9,
            "cell_type": pd.Categorical(["CD14+ Monocytes"] * 6 + ["B cells"] * 6),
            "replicate": pd.Categorical((["patient_1016", "patient_1256"] * 6)),
            "nCount_SCT": 1704.0,
            "nFeature_SCT": 711,
            "integrated_snn_res.0.4": pd.Categorical(["1"] * 12),
            "seurat_clusters": pd.Categorical(["1"] * 12),
        },
        index=[f"{b}-0" for b in barcodes(12)],
    )
    return AnnData(
        sparse.csr_matrix(counts(12)), obs=obs, var=pd.DataFrame({"name": GENES}, index=GENES)
    )


def muscat():
    labels = (["ctrl"] * 3 + ["stim"] * 3) * 2
    obs = pd.DataFrame(
        {
            "barcode": barcodes(12),
            "cluster_id": pd.Categorical(["CD14+ Monocytes"] * 6 + ["B cells"] * 6),
            "sample_id": pd.Categorical([f"{l}{101 + 6 * (i % 2)}" for i, l in enumerate(labels)]),
            "group_id": pd.Categorical(labels),
        },
        index=barcodes(12, "-1_0"),
    )
    return AnnData(sparse.csr_matrix(counts(12)), obs=obs, var=pd.DataFrame(index=GENES))


SCREEN = ["non-targeting"] * 4 + ["KLF1"] * 3 + ["TBCE"] * 3
PAIRS = ["control"] * 4 + ["KLF1"] * 3 + ["KLF1_MAP2K6"] * 3 + ["SET_KLF1"] * 3
UPR = (
    ["63(mod)_pBA580"] * 2
    + ["Gal4-4(mod)_pBA582", "62(mod)_pBA581"]
    + ["CREB1_pDS269"] * 3
    + ["SEC61A1_pDS031"] * 2
    + ["*", np.nan]
)
NORMAN = {CONTROL, "KLF1", "KLF1+MAP2K6", "KLF1+SET"}
COUPLE = ["ctrl"] * 4 + ["KLF1+ctrl"] * 3 + ["ctrl+MAP2K6"] * 3
GEARS = {CONTROL, "KLF1", "MAP2K6"}

# (dataset, source) -> the file, the perturbations, the contexts, the batches, cells that stay
PUBLISHED = {
    **{
        (n, "scPerturb"): (
            lambda l=l: scperturb_replogle(SCREEN, l),
            {CONTROL, "KLF1", "TBCE"},
            {c},
            {"1", "2", "3"},
            10,
        )
        for n, l, c in (
            ("replogle_k562_essential", "K562", "K562"),
            ("replogle_k562_gwps", "K562", "K562"),
            ("replogle_rpe1", "hTERT-RPE1", "RPE1"),
            ("nadig_hepg2", "Hep-G2", "HepG2"),
            ("nadig_jurkat", "Jurkat", "Jurkat"),
        )
    },
    **{
        (n, s): (lambda: authors(SCREEN), {CONTROL, "KLF1", "TBCE"}, {c}, {"1", "2", "3"}, 10)
        for n, s, c in (
            ("replogle_k562_essential", "figshare", "K562"),
            ("replogle_k562_gwps", "figshare", "K562"),
            ("replogle_rpe1", "figshare", "RPE1"),
            ("nadig_hepg2", "GEO", "HepG2"),
            ("nadig_jurkat", "GEO", "Jurkat"),
        )
    },
    ("replogle_k562_essential", "GEARS"): (
        lambda: gears(COUPLE, "K562", more=True),
        GEARS,
        {"K562"},
        {"0"},
        10,
    ),
    ("replogle_rpe1", "GEARS"): (
        lambda: gears(COUPLE, "rpe1", more=True),
        GEARS,
        {"RPE1"},
        {"0"},
        10,
    ),
    ("norman", "scPerturb"): (
        lambda: scperturb(
            PAIRS,
            guide_id="KLF1_NegCtrl0__KLF1_NegCtrl0",
            read_count=1252,
            UMI_count=67,
            coverage=18.7,
            gemgroup=np.arange(13) % 8 + 1,
            good_coverage=True,
            number_of_cells=1,
            cell_line="K562",
            celltype="lymphoblasts",
        ),
        NORMAN,
        {"K562"},
        {str(i) for i in range(1, 9)},
        13,
    ),
    ("norman", "GEARS"): (
        lambda: gears(COUPLE + ["KLF1+MAP2K6"] * 2, "A549", layer=True),
        GEARS | {"KLF1+MAP2K6"},
        {"K562"},
        {"0"},
        12,
    ),
    ("norman", "PerturBench"): (
        lambda: perturbench(
            ["control"] * 4 + ["KLF1"] * 3 + ["MAP2K6+KLF1"] * 3,
            "norman19",
            ["k562"] * 10,
            ["none"] * 10,
        ),
        GEARS - {"MAP2K6"} | {"KLF1+MAP2K6"},
        {"K562"},
        {"0"},
        10,
    ),
    ("adamson", "scPerturb"): (
        lambda: scperturb(
            UPR, **{"read count": 1.0, "UMI count": 2.0}, cell_line="K562", celltype="lymphoblasts"
        ),
        {CONTROL, "CREB1", "SEC61A1"},
        {"K562"},
        {"0"},
        9,
    ),
    ("adamson", "scPerturb pilot"): (
        lambda: scperturb(["62(mod)_pBA581"] * 3 + ["SPI1_pDS255"] * 2 + ["*"], cell_line="K562"),
        {CONTROL, "SPI1"},
        {"K562"},
        {"0"},
        5,
    ),
    ("adamson", "GEARS"): (
        lambda: gears(["ctrl"] * 4 + ["CREB1+ctrl"] * 3, "K562"),
        {CONTROL, "CREB1"},
        {"K562"},
        {"0"},
        7,
    ),
    ("sciplex", "scPerturb"): (
        sciplex,
        {CONTROL, "(plus)-JQ1", "Quisinostat (JNJ-26481585) 2HCl"},
        {"A549", "K562"},
        {"rep1", "rep2"},
        12,
    ),
    ("mcfaline", "PerturBench"): (
        lambda: perturbench(
            (["control"] * 3 + ["MAP2K6"] * 3) * 2,
            "mcfaline23",
            ["a172"] * 12,
            ["none"] * 6 + ["trametinib"] * 6,
        ),
        {CONTROL, "MAP2K6"},
        {"a172", "a172 trametinib"},
        {"0"},
        12,
    ),
    ("papalexi", "scPerturb"): (
        lambda: scperturb(
            ["control"] * 3 + ["JAK2g1", "JAK2g2", "STAT1g3", "STAT1g1", "nan"],
            guide_id="NTg4",
            hto=pd.Categorical(["rep1-tx", "rep2-tx"] * 4),
            cell_line="THP-1",
        ),
        {CONTROL, "JAK2", "STAT1"},
        {"THP-1"},
        {"rep1-tx", "rep2-tx"},
        7,
    ),
    ("dixit", "scPerturb"): (
        lambda: scperturb(
            ["control"] * 2
            + ["p_INTERGENIC393453"] * 2
            + [
                "p_sgELK1_2",
                "p_sgELK1_7",
                "p_sgELK1_2 + p_sgYY1_3",
                "p_sgYY1_3 + p_sgELK1_1",
                "nan",
            ],
            grna_lenient="None",
            target="ELK1",
            moi="normal",
            time=168,
            cell_line="K562",
            library="K562_TFs_7_days",
        ),
        {CONTROL, "ELK1", "ELK1+YY1"},
        {"K562"},
        {"0"},
        8,
    ),
    ("dixit", "GEARS"): (
        lambda: gears(["ctrl"] * 4 + ["ELK1+ctrl"] * 3, "K562(?)", layer=True),
        {CONTROL, "ELK1"},
        {"K562"},
        {"0"},
        7,
    ),
    ("kang", "figshare"): (
        kang,
        {CONTROL, "IFNB1"},
        {"CD14+ Monocytes", "B cells"},
        {"patient_1016", "patient_1256"},
        12,
    ),
    ("kang", "muscat"): (
        muscat,
        {CONTROL, "IFNB1"},
        {"CD14+ Monocytes", "B cells"},
        {"101", "107"},
        12,
    ),
}


def packed(a, file):
    "The bytes of a published file."
    path = Path(file).name
    plain = io.BytesIO()
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        a.write_h5ad(Path(d) / "x.h5ad")
        data = (Path(d) / "x.h5ad").read_bytes()
    if path.endswith(".gz"): return gzip.compress(data)
    if not path.endswith(".zip"): return data
    with zipfile.ZipFile(plain, "w") as z:
        z.writestr(f"{Path(path).stem}/perturb_processed.h5ad", data)
    return plain.getvalue()


@pytest.fixture
def publisher(server, monkeypatch):
    """Serves a generated file under its published name; size and checksum of the entry become
    those of the file."""
    def publish(name, source, a):
        real = pick(name, source)
        data = packed(a, real.file)
        server.files[real.file] = data
        other = replace(
            real,
            url=real.url or "https://nowhere",
            size=real.size and len(data),
            hash=real.hash
            and f"{real.hash.split(':')[0]}:{hashlib.new(real.hash.split(':')[0], data).hexdigest()}",
        )
        for module in ("screens", "catalog"):
            monkeypatch.setattr(f"biojepa.{module}.pick", lambda n, s=None: other)
        return server.url
    return publish


def test_every_source_has_an_imitation():
    assert set(PUBLISHED) == {
        (e.key, s.name) for e in entries().values() for s in e.sources if e.key != "tahoe"
    }


@pytest.mark.parametrize("name, source", PUBLISHED, ids=lambda v: v.replace(" ", "-"))
def test_from_the_publisher_to_the_contract(name, source, publisher, tmp_path):
    """Served, downloaded, checked, unpacked, adapted, prepared:

    the contract holds and the numbers are those of the file.
    """
    make, perturbations, lines, batches, n = PUBLISHED[name, source]
    raw = make()
    cells = dataset(
        name,
        source,
        n_genes=len(GENES),
        folder=tmp_path,
        mirror=publisher(name, source, raw),
        **QUICK,
    )
    check(cells)
    o = cells.obs
    assert (
        set(o.perturbation) == perturbations
        and set(o.cell_type) == lines
        and set(o.batch) == batches
        and cells.n_obs == n
    )
    assert (
        set(o["mode"][o.perturbation != CONTROL]) == {entry(name).mode}
        and set(o["mode"][o.perturbation == CONTROL]) == {CONTROL}
        and set(o.dataset) == {name}
    )
    assert (
        "KLF1" in cells.var_names
        and not cells.var_names.duplicated().any()
        and "+" not in "".join(cells.var_names)
    )
    truth = raw.layers["counts"] if "counts" in raw.layers else raw.X
    at = raw.obs_names.get_indexer(o.index)
    if "counts" in cells.layers:
        np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(truth)[at])
    # logged by the publisher, and not logged again
    else:
        np.testing.assert_array_equal(dense(cells.X), dense(raw.X)[at])
    assert ("counts" in cells.layers) == (
        pick(name, source).kind == "counts" or "counts" in raw.layers
    )


def test_the_tutorial_writes_the_published_columns(publisher, tmp_path):
    """The small screen of tutorials/k562 has the columns and kinds of the imitation, and the same
    map reads it."""
    from biojepa.simulator import simulate
    page = json.loads(
        (Path(__file__).resolve().parents[1] / "nbs/tutorials/k562.ipynb").read_text(
            encoding="utf-8"
        )
    )
    code = "\n".join(s for c in page["cells"] if "def published" in (s := "".join(c["source"])))
    names = dict(pd=pd, AnnData=AnnData)
    exec(code, names)
    raw = simulate(
        n_genes=30, n_perturbations=6, cells_per_perturbation=4, n_controls=9, n_batches=3, seed=0
    )
    mine = names["published"](raw)
    theirs = scperturb_replogle(SCREEN, "K562")
    def kinds(frame): return {k: v.dtype.kind for k, v in frame.items()}
    assert kinds(mine.obs) == kinds(theirs.obs) and kinds(mine.var) == kinds(theirs.var)
    assert (mine.obs.index.name, mine.var.index.name, type(mine.X)) == (
        theirs.obs.index.name,
        theirs.var.index.name,
        type(theirs.X),
    )
    cells = dataset(
        "replogle_k562_essential",
        n_genes=30,
        folder=tmp_path,
        mirror=publisher("replogle_k562_essential", None, mine),
        **QUICK,
    )
    assert list(cells.obs.perturbation) == list(raw.obs.perturbation) and set(cells.obs.batch) == {
        "1",
        "2",
        "3",
    }
    np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(raw[:, cells.var_names].X))


def test_repeated_symbols_carry_their_identifier():
    a = adapt(authors(SCREEN), "replogle_rpe1", "figshare")
    assert [g for g in a.var_names if "TBCE" in g] == [f"TBCE_{ENSEMBL[2]}", f"TBCE_{ENSEMBL[-1]}"]


def test_doses_and_times_of_sciplex():
    a = adapt(sciplex(), "sciplex")
    jq1 = a.obs[a.obs.perturbation == "(plus)-JQ1"]
    assert (
        sorted(jq1.dose) == [0.01, 0.1, 10.0]
        and set(jq1.time) == {72.0}
        and set(adapt(kang(), "kang").obs.time) == {6.0}
    )


def test_left_out_cells_are_counted_aloud():
    a = scperturb(
        ["control"] * 3 + ["JAK2g1", "JAK2g2", "STAT1g3", "nan", "unassigned"], hto="rep1-tx"
    )
    with pytest.warns(
        UserWarning,
        match=(
            "papalexi: cells left out: 2 without a clear perturbation, 1 alone with "
            "their perturbation"
        ),
    ):
        adapt(a, "papalexi")
    with pytest.warns(UserWarning, match="6 in a context with fewer than two controls"):
        adapt(
            perturbench(
                ["control"] * 3 + ["MAP2K6"] * 3 + ["MAP2K6"] * 6,
                "mcfaline23",
                ["a172"] * 12,
                ["none"] * 6 + ["trametinib"] * 6,
            ),
            "mcfaline",
        )


def test_another_file_is_refused_with_a_word():
    with pytest.raises(
        BadDataset, match="obs has no column 'perturbation' for perturbation; it has .*condition"
    ):
        adapt(gears(COUPLE, "K562"), "adamson")
    with pytest.raises(BadDataset, match="no control among .*is this a file of GEARS"):
        adapt(gears(["KLF1+MAP2K6"] * 3, "K562"), "norman", "GEARS")
    with pytest.raises(BadDataset, match="var has no column 'gene_name'"):
        a = gears(COUPLE, "K562")
        del a.var["gene_name"]
        adapt(a, "norman", "GEARS")
    with pytest.raises(BadDataset, match="no cell is left; this is not a file of PerturBench"):
        adapt(perturbench(["control"] * 4, "jiang24", ["a549"] * 4, ["none"] * 4), "mcfaline")
    with pytest.raises(BadDataset, match="muscat has no address; put example_sce.h5ad"):
        get("kang", "muscat")


def test_max_cells_reads_a_part(tmp_path):
    a = authors(["non-targeting"] * 30 + ["KLF1"] * 20 + ["TBCE"] * 5)
    a.write_h5ad(tmp_path / "x.h5ad")
    few = read("replogle_k562_gwps", tmp_path / "x.h5ad", "figshare", max_cells=6)
    # the yardstick is not shortened
    assert few.obs.perturbation.value_counts().to_dict() == {CONTROL: 30, "KLF1": 6, "TBCE": 5}
    np.testing.assert_array_equal(dense(few.X), a[few.obs_names].X)
    assert list(few.obs_names) != list(
        read("replogle_k562_gwps", tmp_path / "x.h5ad", "figshare", max_cells=6, seed=1).obs_names
    )


# Tahoe, by parts

def tahoe_files():
    "Two parts and both tables, with the columns and types of Hugging Face."
    def part(seed, drugs):
        rng = np.random.default_rng(seed)
        rows = []
        for i, d in enumerate(drugs):
            genes = np.sort(rng.choice(np.arange(3, 9), 4, replace=False))
            rows.append(
                dict(
                    genes=[1 if seed == 0 else 3, *genes.tolist()],
                    expressions=[-2.0, *rng.integers(1, 9, 4).astype(float).tolist()],
                    drug=d,
                    sample=f"smp_{d[:3]}",
                    BARCODE_SUB_LIB_ID=f"01_001_{seed}{i:03d}-lib_841",
                    cell_line_id="CVCL_0023",
                    **{"moa-fine": "unclear"},
                    canonical_smiles="CCO" if d != "DMSO_TF" else "",
                    pubchem_cid="702",
                    plate=f"plate{seed + 1}",
                )
            )
        table = pd.DataFrame(rows)
        table["expressions"] = table.expressions.map(lambda v: np.array(v, dtype=np.float32))
        return table
    genes = pd.DataFrame(
        dict(
            gene_symbol=[f"G{i}" for i in range(3, 9)],
            ensembl_id=ENSEMBL[:6],
            token_id=np.arange(3, 9),
        )
    )
    samples = pd.DataFrame(
        dict(
            sample=["smp_DMS", "smp_Dab"],
            drug=["DMSO_TF", "Dabrafenib"],
            plate=["plate1", "plate1"],
            drugname_drugconc=["[('DMSO_TF', 0.0, 'uM')]", "[('Dabrafenib', 0.05, 'uM')]"],
        )
    )
    tables = {
        "tahoe/train-00000-of-03388.parquet": part(0, ["DMSO_TF"] * 4 + ["Dabrafenib"] * 3),
        "tahoe/train-00002-of-03388.parquet": part(1, ["DMSO_TF"] * 3 + ["Dabrafenib"] * 2),
        "tahoe/gene_metadata.parquet": genes,
        "tahoe/sample_metadata.parquet": samples,
    }
    out = {}
    for name, t in tables.items():
        buffer = io.BytesIO()
        t.to_parquet(buffer)
        out[name] = buffer.getvalue()
    return tables, out


def test_tahoe_by_parts(server, tmp_path):
    tables, server.files = tahoe_files()
    cells = dataset("tahoe", parts=[0, 2], folder=tmp_path, mirror=server.url, n_genes=6, **QUICK)
    check(cells)
    assert sorted(p for p, _ in server.asked) == sorted(tables)
    assert (
        set(cells.obs.perturbation) == {CONTROL, "Dabrafenib"}
        and set(cells.obs.batch) == {"plate1", "plate2"}
        and cells.n_obs == 12
    )
    assert set(cells.obs.dose[cells.obs.perturbation != CONTROL]) == {0.05} and set(
        cells.obs.time
    ) == {24.0}
    # every count in its place, the marker nowhere
    for table in list(tables.values())[:2]:
        for r in table.itertuples():
            own = cells[str(r.BARCODE_SUB_LIB_ID)].to_df("counts").iloc[0]
            assert own[own > 0].to_dict() == {
                f"G{g}": float(v) for g, v in zip(r.genes[1:], r.expressions[1:])
            }


def test_tahoe_is_never_taken_whole(server, tmp_path):
    with pytest.raises(BadDataset, match="337.6 GB in 3388 parts: name some with parts="):
        get("tahoe", folder=tmp_path, mirror=server.url, **QUICK)
    with pytest.raises(BadDataset, match="0 to 3387, not 3388"):
        get("tahoe", parts=[1, 3388], folder=tmp_path, mirror=server.url, **QUICK)
    assert not server.asked


# the command line

def test_shell(server, tmp_path, publisher):
    def run(*words): return CliRunner().invoke(app, ["data", *words])
    out = run("list").output
    assert all(name in out for name in ROWS)
    assert "number_of_cells" in run("show", "norman").output
    wrong = run("show", "nroman")
    assert isinstance(wrong.exception, BadDataset) and "did you mean norman" in str(wrong.exception)
    make = PUBLISHED["papalexi", "scPerturb"][0]
    out = run(
        "get",
        "papalexi",
        "--folder",
        str(tmp_path),
        "--mirror",
        publisher("papalexi", None, make()),
        "--prepare",
        str(tmp_path / "cells.h5ad"),
        "--n-genes",
        "8",
        "--no-progress",
    )
    assert out.exit_code == 0, out.output
    check(anndata.read_h5ad(tmp_path / "cells.h5ad"))
    assert "PapalexiSatija2021_eccite_RNA.h5ad" in out.output and "7 cells x 8 genes" in out.output
    asked = len(server.asked)
    out = run(
        "get",
        "papalexi",
        "--file",
        str(tmp_path / "PapalexiSatija2021_eccite_RNA.h5ad"),
        "--prepare",
        str(tmp_path / "own.h5ad"),
        "--n-genes",
        "8",
    )
    assert out.exit_code == 0 and "7 cells x 8 genes" in out.output and len(server.asked) == asked
    assert isinstance(
        run("get", "papalexi", "--file", str(tmp_path / "nowhere.h5ad")).exception,
        FileNotFoundError,
    )


# the real extracts

REAL = Path(os.environ.get("BIOJEPA_DATA", "nowhere")) / "data"
needs_data = pytest.mark.skipif(
    not REAL.exists(), reason="set BIOJEPA_DATA to the folder of the real extracts"
)


@needs_data
@pytest.mark.parametrize(
    "name, source, file, n, perturbations, lines, batches",
    [
        ("norman", "PerturBench", "norman19_mcfaline23/devel.h5ad", 3375, 33, {"K562"}, {"0"}),
        (
            "mcfaline",
            None,
            "norman19_mcfaline23/devel.h5ad",
            2586,
            9,
            {"A172", "T98G", "U87MG"},
            {"0"},
        ),
        (
            "papalexi",
            None,
            "papalexi21/papalexi_thp1_299genes.h5ad",
            16192,
            25,
            {"THP-1"},
            {"rep_1", "rep_2", "rep_3"},
        ),
        (
            "kang",
            "muscat",
            "kang18/example_sce.h5ad",
            1556,
            1,
            {"B cells", "CD14+ Monocytes", "CD4 T cells", "CD8 T cells", "FCGR3A+ Monocytes"},
            {"101", "107"},
        ),
    ],
)
def test_real_extract(name, source, file, n, perturbations, lines, batches):
    raw = anndata.read_h5ad(REAL / file)
    cells = dataset(name, source, paths=REAL / file, n_genes=raw.n_vars)
    check(cells)
    assert (
        cells.n_obs == n
        and cells.obs.perturbation.nunique() - 1 == perturbations
        and set(cells.obs.cell_type) == lines
        and set(cells.obs.batch) == batches
    )
    kept = raw[cells.obs_names, cells.var_names]
    if name in ("norman", "mcfaline"):
        np.testing.assert_array_equal(dense(cells.X), dense(kept.X))
        np.testing.assert_allclose(np.expm1(cells.obs.log_total), kept.obs.ncounts, rtol=1e-5)
    else: np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(kept.X))


# what nobody can check is taken, and said

def test_a_source_without_a_checksum_is_named_when_it_is_fetched(server, tmp_path):
    "Twelve of 26 sources print none: the warning has the file, the source, the server, the hash."
    unchecked = [s for e in entries().values() for s in e.sources if s.url and s.hash is None]
    assert unchecked
    server.files["example.zip"] = MAGIC[".zip"] + BODY
    with pytest.warns(Unchecked, match="a.h5ad of the lab: no checksum .* sha256:") as caught:
        fetch(f"{server.url}/a.h5ad", tmp_path / "a.h5ad", publisher="the lab", **QUICK)
    assert str(caught[0].message).endswith("sha256:" + hashlib.sha256(BODY).hexdigest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(f"{server.url}/a.h5ad", tmp_path / "b.h5ad", MD5, **QUICK)


def test_every_source_that_is_not_checked_warns(tmp_path, monkeypatch):
    "By way of `get`, with the name of the source."
    named = []
    def seen(url, path, hash=None, size=None, progress=True, publisher=None, **net):
        named.append((publisher, hash))
        return Path(path)
    monkeypatch.setattr("biojepa.screens.fetch", seen)
    monkeypatch.setattr("biojepa.screens.unpack", lambda p: p)
    for e in entries().values():
        for s in e.sources:
            if s.url is None: continue
            get(e.key, s.name, parts=[0] if s.parts else None, folder=tmp_path)
            assert named[-1] == (s.name, s.hash)


@pytest.mark.parametrize("how", ["link", "array"])
@pytest.mark.parametrize("max_cells", [None, 2])
def test_a_file_that_points_out_of_itself_is_refused(tmp_path, how, max_cells):
    "HDF5 can name another file as its content; neither way of reading follows."
    import h5py
    path = tmp_path / "x.h5ad"
    PUBLISHED["papalexi", "scPerturb"][0]().write_h5ad(path)
    (tmp_path / "secret").write_bytes(b"s" * 800)
    with h5py.File(path, "a") as f:
        if how == "link":
            f["uns/more"] = h5py.ExternalLink("other.h5", "/x")
        else:
            f["uns"].create_dataset(
                "more", (100,), "f8", external=[(str(tmp_path / "secret"), 0, 800)]
            )
    with pytest.raises(BadCells, match="not followed"):
        read("papalexi", path, max_cells=max_cells)
