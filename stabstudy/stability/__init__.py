"""What a spike is, and how a trial is judged.

A *spike* is a maximal stretch of optimizer steps whose gradient norm (or loss) stands out from the steps before it: at
least k robust standard deviations above the median of the last W ordinary values. Robust, because a mean and a standard
deviation are moved by the very spikes they should find; ordinary, because a flagged value that entered the window would
hide the next one. A level that lasts becomes the new level: the third outlier in a row is admitted, the window moves,
and the flags end by themselves, while the spike's own baseline stays frozen at its start, so that its duration is
measured against the level it left.

The gradient norm is taken BEFORE clipping. After clipping it is never above the threshold: a run that is clipped at
every step shows a flat line, whatever happens underneath. Whether clipping hides a spike is a question for the record
(`clip_share`), not a property of the measurement.

An adaptive detector divides by the roughness it should report: the rougher the run, the fewer its flags. So no count
stands alone here. Beside it stand an absolute rule (`ratio3`), the spread of the log norm, and the verdict, which looks
at how long spikes last and whether the loss follows them.

Beside our rules stand the published ones, exactly as published but for their defects, so that a study can be set beside
the numbers of others.

    rules -> detectors, calm | published, offline, moments -> events -> attribution, verdict -> summary
"""
