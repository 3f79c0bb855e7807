"""Write, find, check and read checkpoints. Knows no training.

manifest, meta   files of one folder: names, sizes, checksums, meta.json
store            folders of one run: published, pruned, removed
compatibility    whether a run can go on from a checkpoint; data_record: on the same data
find             which checkpoint a run starts from
save, load       by all ranks together, through torch_dist/; all_ranks: how they fail together
weights_only     checkpoints of an import
diff             two checkpoints compared
"""
