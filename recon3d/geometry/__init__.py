"""recon3d.geometry"""
