"""What is installed, what this machine can do, and what is missing for each extra. Nothing is downloaded or
changed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any


def examine() -> dict[str, Any]:
    """Everything, as plain data."""
    core, extras = packages()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "core": core,
        "extras": extras,
        "machine": machine(),
        "sandbox": sandbox(),
        "sandbox_missing": sandbox_missing(),
        "toy_models": toy_models(),
        "plugins": plugins(),
        "hub": {k: os.environ.get(k) for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME")},
    }


# --------------------------------------------------------------------------------------------------- packages


def packages() -> tuple[dict[str, str | None], dict[str, dict[str, Any]]]:
    """Versions of what luthier needs, and for each extra what is there, what is missing, and the command that
    adds it.
    """
    core: dict[str, str | None] = {"luthier": installed("luthier")}
    extras: dict[str, dict[str, Any]] = {}
    for line in requires("luthier") or ():
        what, _, when = line.partition(";")
        name = re.match(r"[\w.-]+", what.strip()).group()
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", when)
        if extra is None:
            core[name] = installed(name)
        elif name != "luthier":  # an extra made of others lists them by itself
            extras.setdefault(extra.group(1), {"have": {}, "missing": [], "install": None})
            here = extras[extra.group(1)]
            if present := installed(name):
                here["have"][name] = present
            else:
                here["missing"].append(name)
                here["install"] = f"pip install 'luthier[{extra.group(1)}]'"
    return core, extras


def installed(name: str) -> str | None:
    """A package's version, from its metadata: it is not imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ the machine


def machine() -> dict[str, Any]:
    """Back-ends and their precisions, memory and disk."""
    import torch

    from luthier.model.load import device, pick_dtype
    from luthier.sandbox.sandbox import cores

    where = device()
    return {
        "cpu": {"threads": torch.get_num_threads(), "cores": cores(), "bfloat16": bf16(), "float32": True},
        "cuda": [card(i) for i in range(torch.cuda.device_count())],
        "mps": bool(torch.backends.mps.is_available()),
        "takes": f"{where.type} in {str(pick_dtype('auto', where)).removeprefix('torch.')}",
        "memory_gb": memory(),
        "free_disk_gb": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def bf16() -> str:
    """How the processor multiplies in bfloat16."""
    import torch

    queries = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    features = []
    for name, query in queries.items():
        if getattr(torch.cpu, query, lambda: False)():
            features.append(name)
    return ", ".join(features) or "slow (no AMX, no AVX-512 BF16)"


def card(i: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(i)
    return {
        "name": about.name,
        "memory_gb": round(about.total_memory / 2**30, 1),
        "bfloat16": torch.cuda.is_bf16_supported(),
        "capability": f"{about.major}.{about.minor}",
    }


def memory() -> float | None:
    """Gigabytes of this machine; None where the system does not report it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def sandbox() -> dict[str, bool]:
    """Which protections from programs that a model wrote hold on this machine."""
    from luthier.sandbox.sandbox import sandbox_report

    return sandbox_report()


def sandbox_missing() -> str:
    """A sentence on the walls that this machine does not give, and why; '' where nothing is missing."""
    from luthier.sandbox.sandbox import missing_walls

    return missing_walls()


def toy_models() -> list[str]:
    """The toy models that luthier ships."""
    from luthier.toy import models

    return [f"toy:{name}" for name in models()]


def plugins() -> list[dict[str, Any]]:
    """The methods that other packages announce: {kind, name, package, place, usable}. Each is imported."""
    from luthier import registry

    announced = []
    for kind in registry.KINDS:
        usable = [cls.name for cls in registry.classes(kind)] if registry.plugins(kind) else []
        for name, point in registry.plugins(kind).items():
            facts = {"kind": kind, "name": name, "package": registry.package_of(point)}
            announced.append({**facts, "place": point.value, "usable": name in usable})
    return announced


# --------------------------------------------------------------------------------------------------- in words


def summary(facts: dict[str, Any]) -> str:
    """For people."""
    here, cpu = facts["machine"], facts["machine"]["cpu"]
    lines = [f"python {facts['python']} on {facts['system']}", "", "installed"]
    for name, present in facts["core"].items():
        lines += [f"  {name:<14} {present or 'MISSING: pip install ' + name}"]
    lines += ["", "extras"]
    for name, extra in facts["extras"].items():
        versions = ", ".join(f"{k} {v}" for k, v in extra["have"].items())
        lines += [f"  {name:<14} {versions or 'nothing yet'}"]
        if extra["missing"]:
            lines += [f"  {'':<14} missing {', '.join(extra['missing'])}: {extra['install']}"]
    lines += [
        "",
        "machine",
        (
            f"  {'cpu':<14} {cpu['cores']} cores, {cpu['threads']} thread{'s' * (cpu['threads'] > 1)};"
            f" bfloat16: {cpu['bfloat16']}"
        ),
    ]
    for gpu in here["cuda"]:
        bfloat16 = yes_or_no(gpu["bfloat16"])
        lines += [f"  {'cuda':<14} {gpu['name']}, {gpu['memory_gb']} GB, bfloat16: {bfloat16}"]
    if not here["cuda"]:
        lines += [f"  {'cuda':<14} none"]
    lines += [f"  {'mps':<14} {'available, not used by luthier' if here['mps'] else 'none'}"]
    lines += [f"  {'memory':<14} {here['memory_gb'] or '?'} GB, {here['free_disk_gb']} GB of disk free here"]
    lines += [
        f"  {'runs on':<14} {here['takes']} (dtype: auto)",
        "",
        "sandbox for model-written programs",
    ]
    for what, holds in facts["sandbox"].items():
        lines += [f"  {yes_or_no(holds):<4} {what}"]
    if missing := facts.get("sandbox_missing"):
        lines += [f"  {missing}"]
    lines += ["", f"toy models: {', '.join(facts['toy_models']) or 'none'}"]
    for method in facts["plugins"]:
        line = f"{method['kind']} '{method['name']}' of package '{method['package']}' ({method['place']})"
        if not method["usable"]:
            line += ": cannot be imported"
        lines += [line]
    switches = [f"{k}={v}" for k, v in facts["hub"].items() if v]
    lines += [f"hub: {', '.join(switches) or 'online, default cache'}"]
    return "\n".join(lines)


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
