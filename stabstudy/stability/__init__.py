"""Definition of a spike, and the judgement of a trial.

A *spike* is a maximal stretch of optimizer steps whose gradient norm (or loss) stands out from the steps before it. A
step of the norm stands out in one of two ways. It is a *surprise* where its distance from the local level, the median
of the last five values, is at least five robust standard deviations of such distances, and at least a factor of two:
that is unusual for this run, whatever its level does, so an ordinary decay neither hides a spike nor makes one. It is
*absolute* where it is three times the local level and three times the median of the last 64 values: that is large by
any standard, also in a run in which everything is rough. Robust, because a mean and a standard deviation are moved by
the very spikes they should find.

The gradient norm is taken BEFORE clipping. After clipping it is never above the threshold: a run that is clipped at
every step shows a flat line, whatever happens underneath. Whether clipping hides a spike is a question for the record
(`clip_share`), not a property of the measurement.

An adaptive detector divides by the roughness it should report: the rougher the run, the fewer its surprises. So no
count stands alone here, and roughness is measured by the absolute rate.

Beside our rules stand the published ones, exactly as published but for their defects, so that a study can be set beside
the numbers of others.

    rules -> detectors | published -> spikes, divergence -> verdict -> statistics -> summary
"""
