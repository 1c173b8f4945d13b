"""The pages of the documentation: a module for each that has blocks, with its set-up, its checks and its `PAGE`."""

from support.docs.blocks import Page

from . import distribution, guide, index, integrations, logprobs, migration, readme, vocab_parallel, weightings

PAGES = {
    page.name: page
    for page in (
        readme.PAGE,
        index.PAGE,
        guide.PAGE,
        migration.PAGE,
        integrations.PAGE,
        vocab_parallel.PAGE,
        weightings.PAGE,
        logprobs.PAGE,
        distribution.PAGE,
        Page("results.md"),
        Page("guarantees.md"),
        Page("gpu.md"),
        Page("linear.md"),
        Page("kernels.md"),
        Page("reference.md"),
    )
}
