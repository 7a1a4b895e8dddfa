"""The faults that `tests.mutations` plants, of every part of the house; the tests are quick ones of the default run."""

from tests.planted_faults import (
    adapters,
    data,
    evaluation,
    face,
    formats,
    model,
    preferences,
    reinforcement,
    rollouts,
    serving,
    speculation,
    training,
)

FAULTS = (
    *model.FAULTS,
    *speculation.FAULTS,
    *training.FAULTS,
    *data.FAULTS,
    *formats.FAULTS,
    *evaluation.FAULTS,
    *adapters.FAULTS,
    *preferences.FAULTS,
    *rollouts.FAULTS,
    *reinforcement.FAULTS,
    *face.FAULTS,
    *serving.FAULTS,
)
