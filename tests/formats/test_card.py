"""Model cards: front matter that the hub reads, and strangers' texts that cannot break out."""

from __future__ import annotations

import dataclasses

import yaml
from huggingface_hub import ModelCard

from llmpack import __version__
from llmpack.formats.card import Card
from llmpack.formats.facts import Facts

FACTS = Facts(
    "SmolLM2 135M",
    license="apache-2.0",
    languages=("en", "no"),
    tags=("text-generation", "gguf"),
    base_models=({"repo_url": "https://huggingface.co/org/base"}, {"name": "elsewhere", "repo_url": "https://x.org/y"}),
)
CARD = Card(
    title="smollm2-135m-pi5",
    facts=FACTS,
    source="hf:org/base@abc",
    nbytes=91_700_000,
    parameters=134_515_008,
    recipe='name = "x"\n',
    encodings={"iq4_nl": (210, 60_000_000), "q8_0": (1, 30_000_000)},
    quality=[("mean KL divergence", "0.053 nats")],
    verdict=[
        ("limit", "wanted", "found", "status", "evidence"),
        ("memory", "350 MiB", "300 MiB", "PASS", "measured on this machine"),
    ],
    notes=["the source was quantized already"],
)


def test_the_hub_reads_the_front_matter():
    data = ModelCard(CARD.text()).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["org/base"]
    assert data["base_model_relation"] == "quantized"
    assert data["language"] == ["en", "no"]
    assert data["tags"] == ["gguf", "llmpack", "text-generation"]
    assert data["library_name"] == "gguf"
    assert data["quantized_by"] == f"llmpack {__version__}"


def test_the_card_of_a_model_folder_says_how_transformers_loads_it():
    card = dataclasses.replace(CARD, layout="plain", relation="finetune")
    data = ModelCard(card.text()).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["safetensors", "llmpack", "text-generation"]
    assert data["base_model_relation"] == "finetune"
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card.text()
    assert "llama-cli" not in card.text()


def test_the_text_says_what_is_in_it():
    text = CARD.text()
    assert "# smollm2-135m-pi5\n" in text
    assert "134.5 million parameters in 87.45 MiB, 5.45 bits each" in text
    assert "| iq4_nl | 210 | 57.22 MiB |" in text
    assert "| mean KL divergence | 0.053 nats |" in text
    assert "| limit | wanted | found | status | evidence |" in text
    assert "| memory | 350 MiB | 300 MiB | PASS | measured on this machine |" in text
    assert '```toml\nname = "x"\n```' in text
    assert "- the source was quantized already" in text
    assert "apache-2.0, as the source says" in text
    assert CARD.text() == text


def test_a_licence_of_its_own_and_none():
    own = dataclasses.replace(FACTS, license="other", license_name="tiny", license_link="https://example.org")
    text = dataclasses.replace(CARD, facts=own).text()
    assert "tiny (https://example.org), as the source says" in text
    assert ModelCard(text).data.to_dict()["license_name"] == "tiny"
    silent = dataclasses.replace(CARD, facts=Facts("x"), quality=(), verdict=(), notes=(), encodings={}).text()
    assert "The source names no licence." in silent
    assert "## Quality" not in silent
    assert "base_model" not in silent


def test_strangers_texts_stay_in_their_place():
    facts = Facts("A\n---\nlicense: mit\n# B", license="x\nlicense: mit", tags=("t\n---",), license_link="a\nb")
    card = dataclasses.replace(
        CARD,
        facts=facts,
        title="t\n# u",
        notes=["n\n# v"],
        quality=[("a|b\nc", "1")],
        recipe="x = '''\n```\n# y\n```'''\n",
    )
    text = card.text()
    front, body = text[4:].split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "x\nlicense: mit"
    assert yaml.safe_load(front)["tags"] == ["gguf", "llmpack", "t\n---"]
    assert "\n# B" not in body
    assert "\n# u" not in body
    assert "\n# v" not in body
    assert "| a\\|b c | 1 |" in body
    assert "````toml\n" in body
