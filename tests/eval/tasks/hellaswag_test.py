"""HellaSwag's texts as lm-evaluation-harness cleans them."""

from llama_jax.eval.tasks.hellaswag import clean


def test_marks_of_wikihow_are_left_out():
    text = ' [header] How to knit [title] Find wool. [step] Any will do [substeps] of course.  '
    assert clean(text) == ' How to knit. Find wool. Any will do of course.'
