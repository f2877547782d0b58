"""recon3d.interop"""
