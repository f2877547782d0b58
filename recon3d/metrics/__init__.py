"""recon3d.metrics"""
