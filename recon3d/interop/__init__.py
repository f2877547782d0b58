"""recon3d's operators under the calls of other libraries: sigpy, torchkbnufft and finufft.

Each module stands alone and is imported by name, such as recon3d.interop.finufft. Arrays go in and out without a copy
where their memory allows it: torch tensors, numpy arrays, and anything that speaks DLPack or __cuda_array_interface__.
"""
