"""A trust_remote_code folder: one file beside the weights makes transformers run any width, where this project is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import LanguageConfig
from modeling.decode import generate
from modeling.export import export
from modeling.inference import InferenceModel
from modeling.language import LanguageModel
from tests.parity.test_generate_cli import SENTENCE, write_tokenizer

CFG = LanguageConfig(n_layers=3, d_model=64, headdim=16, widths=(8, 4, 2, 1), d_state=16, chunk_size=16, vocab_size=310)
WIDTHS = {
    "1": (8, 8, 8),
    "1/2": (4, 4, 4),
    "1/4": (2, 2, 2),
    "1h": (1, 1, 1),
    "1,1/4,1/2": (8, 2, 4),
    "3h,1/8,8h": (3, 1, 8),
}
TOLERANCE = 1e-5
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, widths, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(folder)(sys.argv[4], return_tensors="pt")["input_ids"]
with torch.no_grad():
    found = {width: model(ids, width=width).logits for width in widths}
assert not any(name.split(".")[0] in ("modeling", "pretrain") for name in sys.modules), "this project was imported"
torch.save({"ids": ids, **found}, out)
"""


@pytest.fixture(scope="module")
def trained() -> LanguageModel:
    model = LanguageModel(CFG)
    model.init_weights(0)
    with torch.no_grad():
        model.embedding.mul_(20)  # scores far enough apart for greedy texts to be comparable
    return model.eval()


@pytest.fixture(scope="module")
def state(trained: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trained.named_parameters()}


@pytest.fixture(scope="module")
def folder(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("remote")
    write_tokenizer(root / "gpt.json")
    export(state, CFG, CFG.layer_widths(8), "remote_code", root / "whole", tokenizer=root / "gpt.json")
    return root / "whole"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`from_pretrained` that keeps its copies of remote code under tmp_path."""
    import transformers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def from_pretrained(folder: Path, **arguments: Any) -> Any:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)
        return loaded.eval()

    return from_pretrained


@torch.no_grad()
def in_place(model: LanguageModel, tokens_bt: Tensor, widths: tuple[int, ...]) -> Tensor:
    return model.logits(model(tokens_bt, widths))[..., : CFG.vocab_size]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_it_loads_where_this_project_is_not(trained: LanguageModel, folder: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder), json.dumps(list(WIDTHS)), str(tmp_path / "out.pt"), SENTENCE]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    ids_bt = found.pop("ids")
    assert ids_bt.shape[1] > CFG.chunk_size
    for width, logits in found.items():
        assert relative(logits, in_place(trained, ids_bt, WIDTHS[width])) < TOLERANCE, width


@pytest.mark.parametrize("widths", [(4, 4, 4), (8, 2, 4), (1, 8, 3)], ids=str)
def test_a_cut_mix_is_what_it_runs_and_no_more(
    trained: LanguageModel, state: dict[str, Tensor], widths: tuple[int, ...], load: Any, tmp_path: Path
) -> None:
    export(state, CFG, widths, "remote_code", tmp_path / "mix")
    mix = load(tmp_path / "mix")
    tokens_bt = torch.randint(0, CFG.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(mix(tokens_bt).logits, in_place(trained, tokens_bt, widths)) < TOLERANCE
        narrow = mix(tokens_bt, width="1h").logits
    assert relative(narrow, in_place(trained, tokens_bt, (1, 1, 1))) < TOLERANCE
    layer = next(layer for layer, n in enumerate(widths) if n < 8)
    with pytest.raises(ValueError, match=f"layer {layer}: width 8, but this model was cut to {widths[layer]} heads"):
        mix(tokens_bt, width="1")


@pytest.mark.parametrize("width", ["1", "1/8", "1,1/4,1/2"])
def test_generation_of_padded_prompts_is_our_own(trained: LanguageModel, folder: Path, width: str, load: Any) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    model.generation_config.eos_token_id = None  # ours goes on, and the caller stops
    batch = tokenizer(["The", SENTENCE, "fox jumps"], padding=True, return_tensors="pt")
    prompts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 3
    assert prompts[0] == write_tokenizer(folder.parent / "again.json").encode("The").ids
    found = model.generate(**batch, width=width, max_new_tokens=24, do_sample=False)
    columns = generate(InferenceModel(trained), prompts, WIDTHS.get(width, (1, 1, 1)), max_new_tokens=24)
    assert found[:, batch["input_ids"].shape[1] :].tolist() == torch.stack(list(columns), dim=1).tolist()


def test_beams_and_pieces_carry_their_states(folder: Path, load: Any) -> None:
    """Beam search with a cache is beam search without; a text read in two pieces is the text read at once."""
    model = load(folder)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.embedding.weight.mul_(0.05)  # scores so close that beams overtake each other
    tokens_bt = torch.randint(0, CFG.vocab_size, (2, 23), generator=torch.Generator().manual_seed(2))
    common = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 8, "do_sample": False}
    beams, slow = (model.generate(tokens_bt, use_cache=use, width="1/2", **common) for use in (True, False))
    assert torch.equal(beams, slow)
    with torch.no_grad():
        first = model(tokens_bt[:, :9], use_cache=True)
        second = model(tokens_bt[:, 9:], past_key_values=first.past_key_values)
        whole = model(tokens_bt).logits
    assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < TOLERANCE
    with pytest.raises(ValueError, match="the cache is of widths"):
        model(tokens_bt, past_key_values=first.past_key_values, width="1/2")


def test_loss_is_the_next_tokens_and_trains(folder: Path, load: Any) -> None:
    model = load(folder)
    tokens_bt = torch.randint(0, CFG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    labels_bt = tokens_bt.clone()
    labels_bt[0, :5] = -100
    found = model(tokens_bt, labels=labels_bt, width="1/2")
    log_p_btv = torch.log_softmax(found.logits.double(), dim=-1)
    wanted = [-log_p_btv[b, t - 1, tokens_bt[b, t]] for b in range(2) for t in range(1, 20) if b == 1 or t >= 5]
    assert float(found.loss) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)
    found.loss.backward()
    gradient = model.blocks[0].mixer.in_x.grad
    assert gradient[: 4 * 16].abs().sum() > 0
    assert gradient[4 * 16 :].abs().sum() == 0, "width 1/2 has half of the heads"


def test_bf16_keeps_vectors_exact_and_saving_again_keeps_everything(
    state: dict[str, Tensor], folder: Path, load: Any, tmp_path: Path
) -> None:
    half = load(folder, dtype=torch.bfloat16)
    assert half.blocks[0].mixer.in_x.dtype == torch.bfloat16
    assert torch.equal(half.blocks[1].mixer.A_log, state["blocks.1.mixer.A_log"])
    assert torch.equal(half.final_norm, state["final_norm"])
    tokens_bt = torch.arange(12)[None]
    with torch.no_grad():
        assert relative(half(tokens_bt).logits, load(folder)(tokens_bt).logits) < 3e-2  # three digits, three layers
    load(folder).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), load(folder).parameters(), strict=True))


def test_a_config_alone_makes_a_model_that_can_train(folder: Path, load: Any) -> None:
    loaded = load(folder)
    fresh = type(loaded)(loaded.config)
    assert all(torch.isfinite(p).all() for p in fresh.parameters())
    loss = float(fresh(torch.arange(40)[None], labels=torch.arange(40)[None]).loss)
    assert loss == pytest.approx(torch.tensor(float(CFG.vocab_size)).log().item(), abs=0.5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"width": "1/3"}, "whole number"),
        ({"width": "1,1/2"}, "2 widths for 3 layers"),
        ({"width": "wide"}, "not a number"),
        ({"width": [8, 0, 8]}, "width 0 is 0 heads"),
        ({"width": 0.5}, "write a fraction"),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "use_cache": True}, "padding on the left"),
    ],
    ids=str,
)
def test_mistakes_are_named(folder: Path, load: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(folder)(torch.tensor([[1, 2, 3]]), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")
@pytest.mark.timeout(900)  # mamba-ssm's kernels tune themselves for minutes at first use
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_with_mamba_ssms_scan(trained: LanguageModel, folder: Path, load: Any, dtype: torch.dtype) -> None:
    """Its products are TF32 there, and bfloat16 has three digits; then steps in plain PyTorch from the scan's state."""
    model = load(folder, dtype=dtype).cuda()
    tokens_bt = torch.randint(0, CFG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    for width, widths in WIDTHS.items():
        expected = in_place(trained, tokens_bt, widths)
        with torch.no_grad():
            first = model(tokens_bt[:, :37].cuda(), width=width, use_cache=True)
            pieces, past = [first.logits], first.past_key_values
            for t in range(37, 40):
                pieces.append(model(tokens_bt[:, t : t + 1].cuda(), width=width, past_key_values=past).logits)
        found = torch.cat(pieces, dim=1).cpu()
        assert relative(found, expected) < (5e-3 if dtype == torch.float32 else 5e-2), width
