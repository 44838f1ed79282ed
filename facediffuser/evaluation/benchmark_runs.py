"""The runs of `generate` whose datasets a benchmark of methods is made of."""

from pathlib import PurePosixPath

from facediffuser.dataset.inputs import read_prompts, read_subjects
from facediffuser.dataset.suites import prompts_file, suites
from facediffuser.errors import InputError
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.number_words import counted
from facediffuser.settings import GenerateWorkers, Repeats, Sampling, Seeded


def benchmark_runs(settings: EvaluateSettings) -> list[GenerateSettings]:
    """Return a run for each suite and method; their rows have the same ids and seeds, so the same first noise.

    The dataset of a method goes to `images/<suite>/<method>` of the output.

    Raises:
        InputError: a suite cannot be read, or asks for more subjects than there are.
    """
    # One table has one set of scorers: what scores other systems' images scores these too.
    scorers = settings.scorers if settings.images or "scorers" in settings.model_fields_set else None
    if not settings.benchmark:
        return []
    assert settings.subjects is not None and settings.output is not None  # the settings ask for both with a benchmark
    subjects = len(read_subjects(settings.subjects))
    runs = []
    for suite in settings.benchmark:
        file = prompts_file(suite)
        count = max(prompt.subjects for prompt in read_prompts(file))
        if subjects < count:
            raise InputError(
                f"{settings.subjects}: {counted(subjects, 'subject')}, and {suite} shows {count} in an image; add some"
            )
        name = suite if suite in suites() else PurePosixPath(suite).stem
        runs += [
            GenerateSettings(
                **settings.values_of(Sampling, Seeded, Repeats, GenerateWorkers),
                models=settings.models,
                subjects=settings.subjects,
                prompts=file,
                output=f"{settings.output.rstrip('/')}/images/{name}/{method}",
                method=method,
                batch_size=settings.generate_batch_size,
                scorers=scorers,
            )
            for method in settings.methods
        ]
    if len({run.output for run in runs}) < len(runs):
        raise InputError(
            f"--benchmark {','.join(settings.benchmark)}: two suites or methods of one name; rename a file"
        )
    return runs
