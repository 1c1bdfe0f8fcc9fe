"""What axe-core finds in an open page that keeps people out of it."""

from axe_playwright_python.base import AXE_SCRIPT

GRADIO_S_OWN = [
    # Where nothing is shown yet, Gradio names an element that has no role; the name is of no use, and does no harm.
    ("aria-prohibited-attr", ".empty[aria-label='Empty value']"),
]
"""Rule and selector of what Gradio's parts do and a style sheet cannot mend."""

_FIND = """async (known) => {
    const {violations} = await axe.run({resultTypes: ['violations']});
    const isKnown = (rule, target) =>
        known.some(([of, selector]) => of === rule && document.querySelector(target)?.matches(selector));
    const matters = ({id, impact}) => ['serious', 'critical'].includes(impact) || id === 'heading-order';
    return violations.filter(matters).flatMap(({id, nodes}) =>
        nodes.filter(({target}) => !isKnown(id, target[0]))
            .map(({target, failureSummary}) => `${id}: ${target[0]}: ${failureSummary.split('\\n')[1]}`));
}"""


def barriers(page, tries: int = 20) -> list[str]:
    """The serious and critical violations that stay, and headings that leave a level out.

    What is just being drawn is pale, and is asked for again.
    """
    if not page.evaluate("'axe' in window"):
        page.evaluate(f"{AXE_SCRIPT}\n;0")
    for _ in range(tries):
        found = page.evaluate(_FIND, GRADIO_S_OWN)
        if not found:
            break
        page.wait_for_timeout(1000)
    return found
