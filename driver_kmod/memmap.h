/* SPDX-License-Identifier: GPL-2.0-only */
/* The layout of the memory map: its life, and sending it. */
#ifndef VBW_MEMMAP_H
#define VBW_MEMMAP_H

#include <linux/list.h>
#include <linux/types.h>

struct vbw_push;

/**
 * struct vbw_memmap_listener - learns when the layout that was sent is void
 * @node: in the list of listeners
 * @changed: called then; must not sleep for long and must not call vbw_memmap_*
 */
struct vbw_memmap_listener {
	struct list_head node;
	void (*changed)(struct vbw_memmap_listener *listener);
};

int vbw_memmap_init(void);
void vbw_memmap_exit(void);
void vbw_memmap_listen(struct vbw_memmap_listener *listener);
void vbw_memmap_unlisten(struct vbw_memmap_listener *listener);
int vbw_memmap_send(struct vbw_push *push);
u32 vbw_memmap_layout_id(void);

#endif /* VBW_MEMMAP_H */
