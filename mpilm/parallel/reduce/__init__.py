"""Gradient reduction: from the gradients of single microbatches to their sum over all ranks.

Four levels; build.py knows which choices go together:

    accumulate over microbatches     step.StepReducer (ZeRO 0, 1)  |  rounds.MicrobatchRoundReducer (ZeRO 2, 3)
     └ reduce across ranks           shared_memory.SharedMemoryReducer | messages.MessageReducer (both in tree order)
                                     messages.AllReduceReducer (MPI_Allreduce) | powersgd.PowerSGDReducer
        └ exchange a bucket          ops.tree_reduce.TreeOrderReduceScatter (with all ranks at once)
                                     ops.recursive_halving.RecursiveHalvingReduceScatter (in log2(P) rounds), both in tree order
           └ encode                  ops.tree_reduce.GradientEncoding (float32) | BFloat16Encoding (error feedback)

build.build_reducer makes the combination that the config asks for; diloco.DiLoCo replaces the reduction between replicas by
occasional synchronization. Backward delivers gradients through post-accumulate hooks that the two reducers register.
"""
