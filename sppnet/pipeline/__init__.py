"""Everything that resumes: training in stages, evaluation and prediction over many images.

run_data    which images a run trains on and is evaluated on
stages      the graph of the stages: digests, folders, what depends on what; stage_status: what is there of each
networks    the backbone and the head of a training run, as far as its stages have made them
training    the stages of section 4.1 in order, on one screen; thresholds: the last of them
combination a run made of others
evaluation  a split: detections, evaluation, files
prediction  any images: pictures, detections.json, detections.csv
"""
