"""Name the environment variables by which a launcher tells its workers how they meet."""

# a file that the user alone can open, where all ranks are on one machine
STORE_FILE = "MSA_TRAIN_STORE"
# the variables that say that there are several ranks, where torchrun or srun has started them
SAID_BY = "MSA_TRAIN_SAID_BY"
