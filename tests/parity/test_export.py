"""What is exported computes what the nested model computes in place, in each format's own library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling import export as export_module
from modeling import nesting
from modeling.checkpoint_reader import CheckpointError
from modeling.config import LanguageConfig
from modeling.convert import cut_mix
from modeling.export import export, main, read_source
from modeling.language import LanguageModel
from modeling.model_folder import ModelFolderError, load_model, save_model
from tests.parity import oracles
from tests.parity.test_generate_cli import SENTENCE, write_tokenizer

CFG = LanguageConfig(n_layers=3, d_model=64, headdim=16, widths=(8, 4, 2, 1), d_state=16, chunk_size=16, vocab_size=100)
MIXES = [(8, 8, 8), (8, 2, 4), (1, 8, 3), (2, 2, 2)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel(CFG)
    model.init_weights(0)
    return model.eval()


@pytest.fixture(scope="module")
def state(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def tokens_bt() -> Tensor:
    return torch.randint(0, 100, (2, 37), generator=torch.Generator().manual_seed(1))


def test_no_row_beside_the_vocabulary_is_written_that_another_would_draw_from(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """`generate` of transformers and of mamba-ssm samples from as many rows as there are."""
    assert state["embedding"].shape[0] > CFG.vocab_size
    for target, file, name in (
        ("hf", "model.safetensors", "embeddings"),
        ("mamba_ssm", "pytorch_model.bin", "embedding"),
    ):
        export(state, CFG, CFG.layer_widths(8), target, tmp_path / target)
        path = tmp_path / target / file
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert loaded[f"backbone.{name}.weight"].shape[0] == CFG.vocab_size
        assert json.loads((tmp_path / target / "config.json").read_text())["vocab_size"] == CFG.vocab_size


@torch.no_grad()
def in_place(model: LanguageModel, tokens_bt: Tensor, widths: nesting.LayerWidths) -> Tensor:
    """Logits of the vocabulary."""
    return model.logits(model(tokens_bt, widths))[..., : CFG.vocab_size]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("n_heads", CFG.widths)
def test_transformers_loads_a_width(
    model: LanguageModel, state: dict[str, Tensor], tokens_bt: Tensor, n_heads: int, tmp_path: Path
) -> None:
    from transformers import Mamba2ForCausalLM

    widths = CFG.layer_widths(n_heads)
    export(state, CFG, widths, "hf", tmp_path / "hf")
    theirs = Mamba2ForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = theirs(tokens_bt).logits
    assert relative(logits, in_place(model, tokens_bt, widths)) < TOLERANCE


@pytest.mark.parametrize("n_heads", [8, 4])
def test_mamba_ssm_loads_a_width(
    model: LanguageModel, state: dict[str, Tensor], tokens_bt: Tensor, n_heads: int, tmp_path: Path
) -> None:
    """Its module needs a GPU to run; here it loads the files, and its reference functions run its weights."""
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    widths = CFG.layer_widths(n_heads)
    export(state, CFG, widths, "mamba_ssm", tmp_path / "m")
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    theirs = MambaLMHeadModel(oracles.MambaConfig(**about))
    loaded = torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=True)
    theirs.load_state_dict(loaded)
    _, small = export_module.cut(state, CFG, n_heads)
    logits = oracles.mamba_ssm_ref_logits({k: v.double() for k, v in loaded.items()}, small, tokens_bt)
    assert relative(logits.float(), in_place(model, tokens_bt, widths)) < TOLERANCE


@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_our_format_holds_any_mix_bit_exactly(
    model: LanguageModel, state: dict[str, Tensor], tokens_bt: Tensor, widths: nesting.LayerWidths, tmp_path: Path
) -> None:
    export(state, CFG, widths, "matmamba", tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert loaded.held == widths
    assert torch.equal(in_place(loaded, tokens_bt, widths), in_place(model, tokens_bt, widths))
    assert sum(p.numel() for p in loaded.parameters()) <= sum(p.numel() for p in model.parameters())


def test_a_cut_model_refuses_what_it_does_not_hold(
    state: dict[str, Tensor], tokens_bt: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(state, CFG, (4, 2, 4), "matmamba", tmp_path / "mix")
    mix = load_model(tmp_path / "mix")
    mix(tokens_bt, (4, 1, 2))
    with pytest.raises(ValueError, match="layer 1: width 4, but this model was cut to 2 heads"):
        mix(tokens_bt, (4, 4, 4))
    assert main([str(tmp_path / "mix"), "--format", "matmamba", "--width", "1/2", "-o", str(tmp_path / "wider")]) == 2
    assert "layer 1: width 4, but this model was cut to 2 heads" in capsys.readouterr().err


@pytest.mark.parametrize("held", [(4, 4, 4), (8, 2, 4)], ids=str)
def test_what_was_cut_out_and_calibrated_is_exported_again(
    state: dict[str, Tensor], tokens_bt: Tensor, held: nesting.LayerWidths, tmp_path: Path
) -> None:
    """Its norms are its own: the run that it came from has others."""
    from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

    part = {name: t * 1.25 if name.endswith("norm") else t for name, t in cut_mix(state, CFG, held).items()}
    save_model(tmp_path / "part", part, CFG, held)
    model = load_model(tmp_path / "part")
    assert isinstance(model, LanguageModel)

    def exported(target: str, *width: str) -> Path:
        folder = tmp_path / "-".join([target, *width]).replace("/", "_")
        assert main([str(tmp_path / "part"), "--format", target, "-o", str(folder), *width]) == 0
        return folder

    for width, widths in (((), held), (("--width", "1/4"), (2, 2, 2))):
        expected = in_place(model, tokens_bt, widths)
        ours = load_model(exported("matmamba", *width))
        assert isinstance(ours, LanguageModel)
        assert torch.equal(in_place(ours, tokens_bt, widths), expected)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(exported("remote_code", *width), trust_remote_code=True)
            assert relative(theirs.eval()(tokens_bt).logits, expected) < TOLERANCE
            if len(set(widths)) == 1:
                theirs = Mamba2ForCausalLM.from_pretrained(exported("hf", *width)).eval()
                assert relative(theirs(tokens_bt).logits, expected) < TOLERANCE


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one number of heads for all layers"):
        export(state, CFG, (8, 2, 4), "hf", tmp_path / "a")
    with pytest.raises(ValueError, match="whole multiple of d_model=64"):
        export(state, CFG, (2, 2, 2), "mamba_ssm", tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        export(state, CFG, (8, 8, 8), "hf", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_transformers_ends_and_pads_a_text_with_the_tokenizers_own_id(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Where config.json is silent, transformers' Mamba2 ends a text at token 2, and fills up what ended early with token 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    cfg = replace(CFG, vocab_size=310)
    larger = {**state, "embedding": torch.zeros(cfg.n_vocab_rows, cfg.d_model)}
    write_tokenizer(tmp_path / "tokenizer.json")
    export(larger, cfg, cfg.layer_widths(8), "hf", tmp_path / "with", tokenizer=tmp_path / "tokenizer.json")
    export(larger, cfg, cfg.layer_widths(8), "hf", tmp_path / "bare")

    def prefer(ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, 0 if ids.shape[1] == prompts.shape[1] + 2 else 2] = 9
        scores[1, 3] = 9
        return scores

    prompts, chosen = torch.tensor([[5], [6]]), LogitsProcessorList([prefer])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    out = model.generate(prompts, max_new_tokens=5, logits_processor=chosen)
    assert out[0].tolist() == [5, 2, 2, 0, 0, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert tokenizer.decode(out[0], skip_special_tokens=True) == tokenizer.decode([5, 2, 2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    out = model.generate(prompts, max_new_tokens=5, logits_processor=chosen)
    assert out[0].tolist() == [5, 2, 2, 0, 2, 2], "nothing is known to end it"


def test_command_line_puts_the_tokenizer_beside_the_model(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    cfg = replace(CFG, vocab_size=310)
    larger = {**state, "embedding": torch.zeros(cfg.n_vocab_rows, cfg.d_model)}
    whole, quarter = tmp_path / "whole", tmp_path / "quarter"
    tokenizer = write_tokenizer(tmp_path / "gpt.json")
    export(larger, cfg, cfg.layer_widths(8), "matmamba", whole)
    arguments = [str(whole), "--width", "1/4", "--format", "hf", "--tokenizer", str(tmp_path / "gpt.json")]
    assert main([*arguments, "-o", str(quarter), "--dtype", "bf16"]) == 0
    names = {path.name for path in quarter.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    about = json.loads((quarter / "config.json").read_text())
    assert (about["num_heads"], about["eos_token_id"]) == (2, 0)
    assert AutoTokenizer.from_pretrained(quarter)(SENTENCE).input_ids == tokenizer.encode(SENTENCE).ids

    ours = tmp_path / "ours"
    assert main([*arguments[:3], "--format", "matmamba", *arguments[5:], "-o", str(ours), "--width", "1"]) == 0
    assert main([str(ours), "--width", "1/4", "--format", "hf", "-o", str(tmp_path / "onward")]) == 0
    onward = {path.name for path in (tmp_path / "onward").iterdir()}
    assert onward == names, "the tokenizer goes on with the model that it stands beside"

    export(state, CFG, CFG.layer_widths(8), "matmamba", tmp_path / "small")
    arguments[0] = str(tmp_path / "small")
    assert "note: no tokenizer" not in capsys.readouterr().out
    assert main([*arguments[:-2], "-o", str(tmp_path / "bare")]) == 0
    assert f"note: no tokenizer stands beside the model ({arguments[0]} names none)" in capsys.readouterr().out
    assert main([*arguments[:-1], "tiktoken:gpt2", "-o", str(tmp_path / "wrong")]) == 2
    assert "--tokenizer tiktoken:gpt2: an encoding is no file" in capsys.readouterr().err
    assert main([*arguments, "-o", str(tmp_path / "wrong")]) == 2
    assert "the model 100: it was trained with another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "this code reads"),
        (lambda folder: _edit(folder, vocab_size=900), "embedding is"),
        (lambda folder: _edit(folder, d_model="__import__('os')"), "does not describe a model"),
        (lambda folder: _edit(folder, d_model=2**62), "does not describe a model"),
        (lambda folder: _edit(folder, n_layers=10**9), "3 widths for 1000000000 layers"),
        (lambda folder: _edit(folder, norm_eps=None), "must be positive"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "does not describe a model"),
        (lambda folder: _edit(folder, surprise=1), "unknown fields"),
    ],
    ids=["cut short", "no format", "other vocabulary", "text", "overflow", "layers", "null", "deep", "unknown field"],
)
def test_a_damaged_model_folder_is_refused(state: dict[str, Tensor], tmp_path: Path, damage: object, says: str) -> None:
    export(state, CFG, CFG.layer_widths(8), "matmamba", tmp_path / "m")
    damage(tmp_path / "m")  # type: ignore[operator]
    with pytest.raises(ModelFolderError, match=says):
        load_model(tmp_path / "m")


def test_a_folder_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run with a checkpoint"):
        read_source(tmp_path)


def _edit(folder: Path, **values: object) -> None:
    about = json.loads((folder / "config.json").read_text())
    about["model"].update(values)
    (folder / "config.json").write_text(json.dumps(about))
