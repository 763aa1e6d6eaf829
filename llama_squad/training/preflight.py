"""What a training run asks of this machine: packages and the Hub, before the model is loaded."""

from importlib.util import find_spec
from typing import Any

from llama_squad.processes import this_process

# where the package's name is not the tracker's
_TRACKER_PACKAGES = {"azure_ml": "azureml-sdk", "flyte": "flytekit"}


def check_deepspeed(config: Any) -> None:
    """Refuse ``--deepspeed`` where the package is missing. Raises ValueError."""
    if config and find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs its package: pip install deepspeed")


def check_zero_stage() -> None:
    """Refuse ZeRO-3, which parts the weights before a model can be tried. Raises ValueError."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed's ZeRO-3 is not supported: take ZeRO-2, or FSDP (--fsdp)")


def check_packages(args: Any) -> None:
    """Refuse what needs a package that is not installed: kernels, trackers, optimizers.

    Args:
        args: the trainer's, after its own checks.

    Raises:
        ValueError: a package is missing, or the optimizer's other flags are.
    """
    from transformers import Trainer
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
        is_flytekit_available,
    )
    from transformers.utils import is_liger_kernel_available

    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs its package: pip install liger-kernel")
    asked = [args.report_to] if isinstance(args.report_to, str) else args.report_to
    here = {*get_available_reporting_integrations(), *["flyte"] * is_flytekit_available()}
    for name in [name for name in asked or [] if name not in here]:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report_to {name} is no tracker: give one of {known}, or none")
        package = _TRACKER_PACKAGES.get(name, name.replace("_", "-"))
        raise ValueError(f"--report_to {name} needs its package: pip install {package}")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        # a few ask for the model next, which they will get: then their package is there
        if "need to pass a" not in str(error):
            reason = " ".join(str(error).split())
            raise ValueError(f"--optim {args.optim.value} cannot be used: {reason}") from error


def check_hub(args: Any) -> None:
    """Refuse ``--push_to_hub`` where the Hub would not take anything from here.

    Raises:
        ValueError: no token, one that the Hub refuses, or no way to the Hub.
    """
    if not args.push_to_hub or not this_process().is_main_process:
        return
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = args.hub_token or get_token()
    if not token:
        raise ValueError(
            "--push_to_hub needs a token: log in with `hf auth login`, or give --hub_token"
        )
    try:
        HfApi().whoami(token=token)
    except HfHubHTTPError as error:
        raise ValueError(
            f"--push_to_hub: the Hub does not take this token (HTTP {error.response.status_code}): "
            "log in anew with `hf auth login`, or give another --hub_token"
        ) from error
    except Exception as error:  # networks fail in many ways
        raise ValueError(
            f"--push_to_hub: the Hub cannot be reached from here ({type(error).__name__}): check "
            "the network and HF_HUB_OFFLINE, or leave the flag out and push later with `hf upload`"
        ) from error
