"""`apply_keye_kernels` and its way back.

A patched module carries one thing more: a bound `forward` of its own, made from a function of this package. What is in place
can be read from that function, so nothing has to be remembered elsewhere, and a copy of a model is a patched model.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

from torch import nn

from .families import ROLES, Role
from .report import Entry, Part, PatchReport, grouped

PACKAGE = __name__.partition(".")[0]
# What the name of a module must look like to be mentioned in a report although nothing is known about its class
SUSPECTS: dict[Part, str] = {
    "rope": "Rotary|RoPE|Rope",
    "attention": "Attention",
    "projector": "Projector|PatchMerger",
}
_parts_of: dict[Callable, frozenset[Part]] = {}


@dataclass
class Site:
    """A module whose class has a role."""

    name: str
    module: nn.Module
    role: Role

    @property
    def exchanging(self) -> Part:
        """The part by which it takes part in the exchange of its rope group; Keye's own attention is replaced as a whole."""
        return "rope" if "rope" in self.role.parts else "attention"

    def entry(self, part: Part, note: str, missing: bool = False) -> Entry:
        return Entry(self.name, type(self.module).__name__, part, note, missing)


def apply_keye_kernels(
    model: nn.Module, *, rope: bool = True, attention: bool = True, projector: bool = True, strict: bool = False
) -> PatchReport:
    """Makes a loaded model run this package's operators; this instance only, its class and its weights stay as they are.

    Args:
        model: Keye's own (remote-code) class, or transformers' PaddleOCR-VL, Qwen2-VL, Qwen2.5-VL or Qwen3-VL; also
            inside another module (a compiled one, for example), or a part of one.
        rope: `rope_2d` in the vision tower, `rope_3d` in the text model.
        attention: `varlen_attention` in the vision tower. The text model's attention stays its own.
        projector: `patch_merge_projection`.
        strict: raise if anything asked for cannot run, instead of saying so in the report; nothing is changed then.

    Returns: what was replaced and what was left alone, and why. Calling again changes nothing and reports the same; flags add
        to what is in place. `with apply_keye_kernels(model):` takes it back at the end of the block.
    Raises: TypeError if `model` is no module; ValueError with `strict`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    asked = {part for part, flag in (("rope", rope), ("attention", attention), ("projector", projector)) if flag}
    sites, strangers = survey(model)
    obstacles = find_obstacles(sites, strangers, asked)

    replaced, left_alone, changes = [], [], []
    for site in sites:
        before = patched_parts(site.module)
        for part, note in site.role.parts.items():
            if part in before or (part in asked and (site.name, part) not in obstacles):
                replaced.append(site.entry(part, note))
            else:
                reason = obstacles.get((site.name, part), f"not asked for ({part}=False)")
                left_alone.append(site.entry(part, reason, missing=part in asked))
        left_alone += [site.entry(part, reason) for part, reason in site.role.own.items()]
        added = {part for part in asked & site.role.parts.keys() if (site.name, part) not in obstacles} - before
        if added:
            changes.append((site, frozenset(added)))
    left_alone += [stranger for stranger in strangers if not stranger.missing or stranger.part in asked]

    missing = tuple(entry for entry in left_alone if entry.missing)
    here_already = any(not stranger.missing for stranger in strangers)
    if strict and (missing or not (replaced or here_already)):
        raise ValueError(_complaint(model, missing))
    for site, added in changes:
        set_parts(site, patched_parts(site.module) | added)

    def undo() -> None:
        broken = {site.role.rope_group for site, added in changes if site.exchanging in added} - {None}
        for site in sites:
            if site.role.rope_group in broken:
                set_parts(site, patched_parts(site.module) - {"rope"})
        for site, added in changes:
            set_parts(site, patched_parts(site.module) - added)
        # What a later call puts in place is not this one's to take back
        changes.clear()

    return PatchReport(type(model).__name__, tuple(replaced), tuple(left_alone), undo)


def revert_keye_kernels(model: nn.Module) -> None:
    """Takes out everything that `apply_keye_kernels` put into `model`; a model without is left as it is.

    Args:
        model: the module that was given to `apply_keye_kernels`, or one around it. A part of it will do where no positions are
            exchanged with the rest.

    Raises: TypeError if `model` is no module; ValueError, and nothing is changed, for a part that exchanges positions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sites = survey(model)[0]
    for group in {site.role.rope_group for site in sites} - {None}:
        givers, takers = _sides([site for site in sites if site.role.rope_group == group])
        for alone, others in ((givers, takers), (takers, givers)):
            if not others and any("rope" in patched_parts(site.module) for site in alone):
                raise ValueError(
                    f"model must be the module that was given to apply_keye_kernels, got {type(model).__name__}, which "
                    f"exchanges positions with modules outside of it"
                )
    for site in sites:
        set_parts(site, frozenset())


def survey(model: nn.Module) -> tuple[list[Site], list[Entry]]:
    """The modules with a role, and report entries for those without whose names suggest that somebody may ask about them."""
    sites, strangers = [], []
    # Names below which strangers are parts of something mentioned already
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if class_name not in ROLES and name.startswith(inside):
            continue
        ours = type(module).__module__.partition(".")[0] == PACKAGE
        if class_name in ROLES and not ours:
            sites.append(Site(name, module, ROLES[class_name]))
            settled = not ROLES[class_name].parts
        else:
            note = f"of {PACKAGE}: runs kk.ops already" if ours else "nothing is known about its class"
            suspected = [part for part, pattern in SUSPECTS.items() if re.search(pattern, class_name)]
            strangers += [Entry(name, class_name, part, note, missing=not ours) for part in suspected]
            settled = bool(suspected)
        if settled:
            inside += (f"{name}.",)
    return sites, strangers


def find_obstacles(sites: list[Site], strangers: list[Entry], asked: set[Part]) -> dict[tuple[str, Part], str]:
    """(module name, part) to the reason for each part that was asked for, is not in place and cannot be."""
    obstacles = {}
    for site in sites:
        for part in (asked & site.role.parts.keys()) - patched_parts(site.module):
            if reason := foreign_forward(site.module) or site.role.obstacle(site.module, part):
                obstacles[site.name, part] = reason
    if "rope" in asked:
        for group in {site.role.rope_group for site in sites} - {None}:
            members = [site for site in sites if site.role.rope_group == group]
            if reason := _group_obstacle(members, strangers, obstacles, asked):
                for site in members:
                    if "rope" in site.role.parts.keys() - patched_parts(site.module):
                        obstacles.setdefault((site.name, "rope"), reason)
    return obstacles


def _sides(members: list[Site]) -> tuple[list[Site], list[Site]]:
    """The modules of a rope group that give positions, and those that take them."""
    takers = [site for site in members if not site.role.gives_positions]
    # A rotary module inside an attention layer is a spare one: the pair comes from further up
    inner = tuple(f"{site.name}." if site.name else "" for site in takers)
    givers = [site for site in members if site.role.gives_positions and not site.name.startswith(inner)]
    return givers, takers


def _group_obstacle(members: list[Site], strangers: list[Entry], obstacles: dict, asked: set[Part]) -> str | None:
    """Why positions cannot travel from the modules that give them to the attention layers that take them."""
    givers, takers = _sides(members)
    if not givers or not takers:
        missing = "gives it positions" if takers else "takes its positions"
        return f"no module of a known class {missing}"
    for site in members:
        part = site.exchanging
        if (site.name, part) in obstacles:
            return f"{site.name or 'a module'} cannot take part: {obstacles[site.name, part]}"
        if part not in asked and part not in patched_parts(site.module):
            return f"here rope_2d runs inside the replaced attention: ask for {part}=True as well"
    homes = tuple(giver.name.rpartition(".")[0] for giver in givers)
    for stranger in strangers:
        if stranger.missing and stranger.part == "attention" and stranger.module.startswith(homes):
            return f"{stranger.module} beside it is of a class that nothing is known about"
    return None


def _slot(module: nn.Module) -> str:
    """Where the module's forward lies: accelerate's hooks put their own in `forward` and keep it in `_old_forward`."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def _bound_function(module: nn.Module) -> Callable | None:
    """The function behind the instance's own forward, None where the class's runs."""
    forward = module.__dict__.get(_slot(module))
    function = forward.__func__ if inspect.ismethod(forward) else forward
    return None if function is type(module).forward else function


def patched_parts(module: nn.Module) -> frozenset[Part]:
    """What this package has taken over in `module`."""
    return _parts_of.get(_bound_function(module), frozenset())


def foreign_forward(module: nn.Module) -> str | None:
    function = _bound_function(module)
    if function is None or function in _parts_of:
        return None
    return f"its forward was already replaced by {getattr(function, '__qualname__', function)}"


def set_parts(site: Site, parts: frozenset[Part]) -> None:
    """Gives the module the forward for `parts`, or its class's for none."""
    module, slot = site.module, _slot(site.module)
    if parts == patched_parts(module):
        return
    if parts:
        function = site.role.forward(module, parts)
        _parts_of[function] = parts
        setattr(module, slot, MethodType(function, module))
    elif slot == "forward":
        del module.forward
    else:
        module._old_forward = MethodType(type(module).forward, module)


def _complaint(model: nn.Module, missing: tuple[Entry, ...]) -> str:
    name = type(model).__name__
    if not missing:
        return f"nothing in {name} can be replaced, and strict=True asks for all of it"
    lines = "\n".join(f"  {line}" for line in grouped(missing))
    return f"strict=True, and these parts of {name} cannot be replaced:\n{lines}"
