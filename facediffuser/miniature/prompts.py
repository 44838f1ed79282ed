"""Prompts for the miniature world, of the benchmark's four kinds; {subject} stands for the person."""

_SINGLE = {
    "accessory": (
        "{subject} wearing a red cap",
        "{subject} wearing a blue beanie",
        "{subject} wearing a black top hat",
        "{subject} wearing a yellow beanie and a green shirt",
        "{subject} wearing a white cap and a red shirt",
        "{subject} wearing a green top hat",
        "{subject} wearing a yellow shirt",
        "{subject} wearing a black shirt",
    ),
    "context": (
        "{subject} on the beach",
        "{subject} in the snow",
        "{subject} in the forest",
        "{subject} in the city",
        "{subject} in the desert",
        "{subject} in a room",
        "a photo of {subject} wearing a red shirt on the beach",
        "a photo of {subject} wearing a blue beanie in the snow",
    ),
    "action": (
        "{subject} waving in the city",
        "{subject} holding a cup in a room",
        "{subject} holding a balloon on the beach",
        "{subject} reading a book in the forest",
        "{subject} smiling in the desert",
        "{subject} surprised in the snow",
        "{subject} smiling and holding a balloon in the city",
    ),
    "style": (
        "a sketch of {subject}",
        "a painting of {subject}",
        "a painting of {subject} on the beach",
        "a sketch of {subject} wearing a black top hat",
        "a painting of {subject} in the forest",
        "a sketch of {subject} in the city",
        "a painting of {subject} wearing a yellow cap",
    ),
}
_PAIR = {
    "accessory": (
        "{subject_1} wearing a red cap and {subject_2} wearing a blue shirt",
        "{subject_1} wearing a green beanie and {subject_2} wearing a yellow beanie",
    ),
    "context": (
        "{subject_1} and {subject_2} on the beach",
        "{subject_1} and {subject_2} in the snow",
        "{subject_1} and {subject_2} in the city",
    ),
    "action": ("{subject_1} smiling and {subject_2} surprised in a room",),
    "style": ("a painting of {subject_1} and {subject_2} in the forest",),
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
