"""Whether figures can be drawn from what their arms train: asked before anything runs."""

from collections import Counter
from importlib import import_module

from roads import config, schema
from roads.stage import UserError


def check(names: list[str], scale: str, params: config.Params) -> None:
    """Look at the bars of figures of a scale, by the modules that will draw them.

    Raises:
        UserError: a module draws no figure of that name, an arm does not train what is shown of it, or two bars would
            have one name.
    """
    for name in names:
        module = import_module(f"roads.figures.{params.figures[name].module}")
        if not (hasattr(module, "FIGURES") and hasattr(module, "bars_of")):
            raise UserError(f"{module.__file__}: expected FIGURES, the names of the figures that it draws, and "
                            "bars_of(scale, name), the bars of one")
        if name not in module.FIGURES:
            raise UserError(f"{config.FIGURES}: {name}.module: {params.figures[name].module} draws "
                            f"{', '.join(module.FIGURES)}, and not {name}; teach it, or name another module")
        bars = module.bars_of(scale, name)
        for bar in bars:
            _, owner, arm, *_ = *bar.place.split("/"), "", ""
            policy = bar.key.removesuffix(".quality")
            cfg = params.arms_of(scale, owner).get(arm) if owner in params.figures else None
            if cfg and policy in schema.POLICIES and policy not in cfg.policies:
                raise UserError(f"{config.PARAMS}: {scale}.arms.{owner}.{arm}.policies: expected {policy} among them, "
                                f"which figure {name} shows; got {cfg.policies}")
        distinct(name, [bar.name for bar in bars])


def distinct(name: str, bars: list[str]) -> None:
    """Raises UserError where two bars of a figure have one name."""
    if twice := [bar for bar, count in Counter(bars).items() if count > 1]:
        raise UserError(f"{name}: two arms have the bar {twice[0]!r}; let them differ in what the figure shows")
