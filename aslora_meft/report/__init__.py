"""`aslora-meft report`: what a run has left in its folder, as figures and tables on one page."""
