"""recon3d.cli"""
