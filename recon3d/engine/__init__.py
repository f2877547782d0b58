"""recon3d.engine"""
