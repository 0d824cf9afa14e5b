"""Draw the worlds of the figure `worlds` at random from stated ranges, as lines of params.yaml.

    python scripts/draw_worlds.py        # prints them; a test holds params.yaml to them

Every world is the next draw of one generator: none was looked at, and none left out. tau is a multiple of the standard
deviation of the quality of a prompt's summaries, 1.74 in mini.
"""

import numpy as np

from roads import config
from roads.judge import quality
from roads.world import World

SEED, WORLDS = 2026, 12
SLOTS, WORDS, CANDIDATES, CLUSTERS = (4, 10), (8, 16), (2, 4), (3, 6)  # both ends are in
COHERENCE, TAU = (0.0, 2.0), (1.3, 2.2)


def spread(world: World, prompts: int = 2000, n: int = 16) -> float:
    """Standard deviation of quality over random summaries of a prompt."""
    rng = np.random.default_rng(0)
    queries = world.prompts(prompts, rng)
    return quality.spread(np.stack([world.quality(queries, world.summaries(queries, rng)) for _ in range(n)], 1))


def draws() -> dict[str, dict]:
    """Name -> what the world changes in mini's."""
    rng, mini, found = np.random.default_rng(SEED), config.load_scale("mini").source, {}
    for k in range(1, WORLDS + 1):
        slots, words, candidates, clusters = (int(rng.integers(low, high + 1)) for low, high in
                                              (SLOTS, WORDS, CANDIDATES, CLUSTERS))
        angle, coherence, tau = rng.uniform(0, 2 * np.pi), rng.uniform(*COHERENCE), rng.uniform(*TAU)
        source = {"seed": 200 + k, "slots": slots, "words": words, "candidates": candidates, "clusters": clusters,
                  "taste": [round(float(np.cos(angle)), 2), round(float(np.sin(angle)), 2)],
                  "interaction": round(float(coherence), 1)}
        unit = spread(World(mini.model_copy(update=source)))
        found[f"w{k:02}"] = source | {"tau": round(float(tau) * unit, 1)}
    return found


if __name__ == "__main__":
    for name, source in draws().items():
        print(f"      {name}: {{source: {{" + ", ".join(f"{key}: {value}" for key, value in source.items()) + "}}")
