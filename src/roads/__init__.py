"""Reproduction of "All Roads Lead to Likelihood": stages/ is the experiment; judge/, figures/, theory/, report/ and
runner/ say whose verdicts it takes, what is drawn and proven, what is concluded, and how it is run."""
