"""recon3d.planes"""
