"""LoRA's layers as one autograd function, and the cross entropy in parts: as PEFT and torch."""

from typing import Any

import cpu_speed
import pytest
import torch
import torch.nn.functional as F
from helpers import collator, tiny_model
from peft import LoraConfig, get_peft_model
from test_activation import activated, paragraphs

from llama_squad import supervised
from llama_squad.activation import activate
from llama_squad.lora import LoraLinear, quicken
from llama_squad.supervised import CrossEntropy
from llama_squad.training.trainer import answer_loss

ROW = collator()([{"paragraphs": paragraphs("question")}])


def gradients(model: Any, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss on a row, by name, and the loss itself."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _, _ = answer_loss(model, ROW)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often a layer is run as one step."""
    made: list[int] = []
    real = LoraLinear.apply

    def counted(*args: Any) -> Any:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(LoraLinear, "apply", counted)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "everywhere", "recomputed"])
def test_layers_train_as_pefts(kind: str, calls: list[int]) -> None:
    """Qwen2's layers have a bias; an adapter may act on all tokens, and layers may be run again."""
    if kind == "everywhere":
        base = tiny_model()
        model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
    else:
        model = activated("question", kind if kind == "qwen2" else "llama")
    if kind == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    wanted = gradients(model)
    quicken(model)
    found = gradients(model)
    assert calls and found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_layers_round_no_more_than_pefts(calls: list[int]) -> None:
    """In bfloat16, over float32 weights of the adapter, as ``--bf16`` trains."""
    exact = gradients(activated("question", dtype=torch.float32))
    model = activated("question", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    torch.manual_seed(1)
    usual = gradients(model, autocast=True)
    quicken(model)
    ours = gradients(model, autocast=True)
    assert calls

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(((found[n].float() - exact[n]).norm() / exact[n].norm()).item() for n in exact)

    assert all(ours[n].dtype == usual[n].dtype for n in ours)
    assert error(ours) < 1.1 * error(usual)


@pytest.mark.parametrize("why", ["switched off", "merged", "dropout", "no mask", "two adapters"])
def test_what_is_more_than_plain_is_left_to_peft(why: str, calls: list[int]) -> None:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        lora_dropout=0.5 if why == "dropout" else 0.0,
    )
    model: Any = get_peft_model(tiny_model(), config)
    if why == "no mask":
        activate(model, "question")
    if why == "two adapters":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    model.train(why == "dropout")
    ids = torch.arange(4, 20)[None]
    run = {"switched off": model.disable_adapter}.get(why)

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        if run is None:
            return model(input_ids=ids).logits
        with run():
            return model(input_ids=ids).logits

    if why == "merged":
        model.merge_adapter()
    wanted = logits()
    quicken(model)
    assert torch.equal(logits(), wanted)
    assert not calls


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cross_entropy_in_parts(
    smoothing: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "CPU_LOGITS", 250)  # 2 tokens at a time, and 1 at the end
    torch.manual_seed(0)
    logits = (torch.randn(9, 100, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    wanted = logits.detach().float().argmax(-1).where(torch.arange(9) < 6, 7)
    loss, right = CrossEntropy.apply(logits, wanted, smoothing)
    (gradient,) = torch.autograd.grad(loss / 9, logits)
    exact = logits.detach().double().requires_grad_()
    total = F.cross_entropy(exact, wanted, reduction="sum", label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(total / 9, exact)
    assert right == (exact.argmax(-1) == wanted).sum()
    assert gradient.dtype == dtype
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), total, atol=1e-4, rtol=1e-6)
    limits = (1e-3, 1e-2) if rough else (1e-7, 1e-7)
    torch.testing.assert_close(gradient.double(), slope, atol=limits[0], rtol=limits[1])


@pytest.mark.parametrize("part", cpu_speed.PARTS)
def test_a_step_without_what_the_benchmark_switches_off(part: str) -> None:
    with cpu_speed.without(part):
        found = gradients(activated("question"))
    torch.testing.assert_close(found, gradients(activated("question")), atol=1e-4, rtol=1e-4)


def test_a_second_gradient_of_a_cross_entropy_is_refused() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    loss, _ = CrossEntropy.apply(logits, torch.arange(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was taken before"):
        loss.backward()


def test_cross_entropy_of_nothing() -> None:
    loss, right = CrossEntropy.apply(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    assert (loss.item(), right.item()) == (0, 0)


def test_a_bias_of_the_base_is_trained(calls: list[int]) -> None:
    """As PEFT does it where an adapter's configuration says ``bias``: the layer is left to it."""
    config = LoraConfig(r=4, target_modules="all-linear", bias="all")
    model: Any = get_peft_model(tiny_model("qwen2"), config)
    wanted = gradients(model)
    quicken(model)
    found = gradients(model)
    assert any(name.endswith("q_proj.base_layer.bias") for name in wanted)
    assert found.keys() == wanted.keys()
    assert calls  # of the layers without one


def test_layers_that_are_given_no_tokens(calls: list[int]) -> None:
    """As an expert that none is sent to."""
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    quicken(model)
    x = torch.zeros(0, 32, requires_grad=True)
    model.model.model.layers[0].self_attn.q_proj(x).sum().backward()
    assert calls and x.grad is not None and x.grad.shape == (0, 32)


@pytest.mark.parametrize("tokens", [1, 4])
def test_tokens_that_no_mask_is_of_are_refused(tokens: int) -> None:
    model = activated("question")
    quicken(model)
    model(ROW["input_ids"][:, :tokens], adapter_mask=torch.ones(1, tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows of tokens"):
        model.model.model.layers[0].self_attn.q_proj(torch.zeros(4, 32))
