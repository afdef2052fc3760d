/* SPDX-License-Identifier: GPL-2.0-only */
/* Memory that goes offline while page structures are being read. */
#ifndef VBW_HOTPLUG_H
#define VBW_HOTPLUG_H

#include <linux/types.h>

int vbw_hotplug_init(void);
void vbw_hotplug_exit(void);

void vbw_hotplug_read_lock(void);
void vbw_hotplug_read_unlock(void);
bool vbw_hotplug_leaving(unsigned long pfn);

#endif /* VBW_HOTPLUG_H */
