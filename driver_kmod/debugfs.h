/* SPDX-License-Identifier: GPL-2.0-only */
/* Counters, and a walk without a device. */
#ifndef VBW_DEBUGFS_H
#define VBW_DEBUGFS_H

struct vbw_device;

void vbw_debugfs_init(void);
void vbw_debugfs_exit(void);
void vbw_debugfs_add(struct vbw_device *vb);
void vbw_debugfs_remove(struct vbw_device *vb);

#endif /* VBW_DEBUGFS_H */
