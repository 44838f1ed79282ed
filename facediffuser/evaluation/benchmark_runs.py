"""The runs of `generate` whose datasets a benchmark of methods is made of."""

from pathlib import PurePosixPath

from facediffuser.dataset.inputs import read_prompts, read_subjects
from facediffuser.dataset.suites import prompts_file, suites
from facediffuser.errors import InputError
from facediffuser.evaluation.evaluate_settings import EvaluateSettings, several
from facediffuser.generation.generate_settings import GenerateSettings


def benchmark_runs(settings: EvaluateSettings) -> list[GenerateSettings]:
    """Return a run for each suite and method; their rows have the same ids and seeds, so the same first noise.

    The dataset of a method goes to `images/<suite>/<method>` of the output. Raises InputError for suites that cannot be
    read or ask for more subjects than there are.
    """
    suites_given = several(settings.benchmark)
    subjects = len(read_subjects(settings.subjects)) if suites_given else 0
    # One table has one set of scorers: what scores other systems' images scores these too.
    scorers = settings.scorers if settings.images or "scorers" in settings.model_fields_set else None
    runs = []
    for suite in suites_given:
        file = prompts_file(suite)
        count = max(prompt.subjects for prompt in read_prompts(file))
        if subjects < count:
            raise InputError(
                f"{settings.subjects}: {subjects} subjects, and {suite} shows {count} in an image; add some"
            )
        name = suite if suite in suites() else PurePosixPath(suite).stem
        for method in several(settings.methods):
            runs.append(
                GenerateSettings(
                    models=settings.models,
                    subjects=settings.subjects,
                    prompts=file,
                    subject_sets=settings.subject_sets,
                    output=f"{settings.output.rstrip('/')}/images/{name}/{method}",
                    method=method,
                    images_per_prompt=settings.images_per_prompt,
                    seed=settings.seed,
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    scheduler=settings.scheduler,
                    fusion_start=settings.fusion_start,
                    fusion_end=settings.fusion_end,
                    workers=settings.workers,
                    cpus_per_worker=settings.cpus_per_worker,
                    shard_size=settings.shard_size,
                    batch_size=settings.generate_batch_size,
                    scorers=scorers,
                )
            )
    places = [run.output for run in runs]
    if len(set(places)) < len(places):
        raise InputError(f"--benchmark {settings.benchmark}: two suites of one name; rename a file")
    return runs
