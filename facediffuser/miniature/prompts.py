"""Prompts for the miniature world, of the benchmark's four kinds; {subject} stands for the person."""

_SINGLE = {
    "accessory": (
        "a {subject} wearing a red cap",
        "a {subject} wearing a blue beanie",
        "a {subject} wearing a black top hat",
        "a {subject} wearing a yellow beanie and a green shirt",
        "a {subject} wearing a white cap and a red shirt",
        "a {subject} wearing a green top hat",
        "a {subject} wearing a yellow shirt",
        "a {subject} wearing a black shirt",
    ),
    "context": (
        "a {subject} on the beach",
        "a {subject} in the snow",
        "a {subject} in the forest",
        "a {subject} in the city",
        "a {subject} in the desert",
        "a {subject} in a room",
        "a photo of a {subject} wearing a red shirt on the beach",
        "a photo of a {subject} wearing a blue beanie in the snow",
    ),
    "action": (
        "a {subject} waving in the city",
        "a {subject} holding a cup in a room",
        "a {subject} holding a balloon on the beach",
        "a {subject} reading a book in the forest",
        "a {subject} smiling in the desert",
        "a {subject} surprised in the snow",
        "a {subject} smiling and holding a balloon in the city",
    ),
    "style": (
        "a sketch of a {subject}",
        "a painting of a {subject}",
        "a painting of a {subject} on the beach",
        "a sketch of a {subject} wearing a black top hat",
        "a painting of a {subject} in the forest",
        "a sketch of a {subject} in the city",
        "a painting of a {subject} wearing a yellow cap",
    ),
}
_PAIR = {
    "accessory": (
        "a {subject_1} wearing a red cap and a {subject_2} wearing a blue shirt",
        "a {subject_1} wearing a green beanie and a {subject_2} wearing a yellow beanie",
    ),
    "context": (
        "a {subject_1} and a {subject_2} on the beach",
        "a {subject_1} and a {subject_2} in the snow",
        "a {subject_1} and a {subject_2} in the city",
    ),
    "action": ("a {subject_1} smiling and a {subject_2} surprised in a room",),
    "style": ("a painting of a {subject_1} and a {subject_2} in the forest",),
}


def _rows(prompts: dict[str, tuple[str, ...]], prefix: str) -> tuple[dict[str, str], ...]:
    return tuple(
        {"prompt_id": f"{prefix}{kind}_{number:02d}", "category": kind, "prompt": prompt}
        for kind, texts in prompts.items()
        for number, prompt in enumerate(texts)
    )


PROMPTS = _rows(_SINGLE, "")
"""30 prompts for one person: accessory, context, action, style."""

PAIR_PROMPTS = _rows(_PAIR, "pair_")
"""7 prompts for two people."""
