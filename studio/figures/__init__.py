"""Numbers -> matplotlib figures in one calm style: for the page and for files (`studio.svg`), for notebooks.

Nothing here touches matplotlib's global state for drawing: every figure is a `Figure` of its own, styled by
`studio.figures.style`, so that it looks the same whatever the caller's settings are. Data colours come from
`studio.palette` and mean the same everywhere; each also has its own line style, marker or hatch.
"""

from studio.figures.compared import bars_figure, lines_figure
from studio.figures.damping import damping_figure
from studio.figures.heat import heat_figure
from studio.figures.loss import loss_figure
from studio.figures.spectra import profile_figure, sigma_figure
from studio.figures.subspaces import intruder_figure, similarity_figure
from studio.figures.surgery import rank_loss_figure
from studio.figures.training import mark_places, training_figure
from studio.figures.weights import alignment_figure, enrichment_figure, weight_figure
